"""The base job templates in profiles/pools are whole: what Prefect would only find out when a job is due, if at all."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((PROJECT / "profiles" / "pools").glob("*.json"))
PLACEHOLDER = re.compile(r"{{\s*(\w+)\s*}}")
templates = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def strings(value: Any) -> list[str]:
    """Return every string in a JSON value, keys left out."""
    if isinstance(value, dict):
        return [found for item in value.values() for found in strings(item)]
    if isinstance(value, list):
        return [found for item in value for found in strings(item)]
    return [value] if isinstance(value, str) else []


def rendered(value: Any, values: dict[str, Any]) -> Any:
    """Return the value as Prefect fills it in: a string that is one placeholder becomes the variable's own type."""
    if isinstance(value, dict):
        return {key: rendered(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [rendered(item, values) for item in value]
    if isinstance(value, str) and (whole := PLACEHOLDER.fullmatch(value)):
        return values[whole[1]]
    return value


def pod(path: Path, **given: Any) -> dict[str, Any]:
    """Return the pod of a job for which `given` was set and all else is the default."""
    template = read(path)
    defaults = {name: settings.get("default") for name, settings in template["variables"]["properties"].items()}
    return rendered(template["job_configuration"]["job_manifest"], defaults | given)["spec"]["template"]["spec"]


@pytest.fixture
def gpu_template() -> Path:
    return PROJECT / "profiles" / "pools" / "kubernetes-gpu.json"


@templates
def test_template_uses_every_variable_that_it_declares_and_no_other(path):
    template = read(path)
    used = {name for text in strings(template["job_configuration"]) for name in PLACEHOLDER.findall(text)}
    assert used == set(template["variables"]["properties"])


@templates
def test_template_variable_without_a_default_is_required_or_may_be_left_out(path):
    """One that may be left out says so by its type: Prefect drops the field then."""
    variables = read(path)["variables"]
    for name, settings in variables["properties"].items():
        optional = settings.get("type") == "object" or {"type": "null"} in settings.get("anyOf", [])
        assert "default" in settings or name in variables["required"] or optional, name
    assert set(variables["required"]) <= set(variables["properties"])


def test_kubernetes_job_is_run_once_and_its_pod_never_restarted(gpu_template):
    job = read(gpu_template)["job_configuration"]["job_manifest"]["spec"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_kubernetes_pod_has_the_gpus_as_a_number_in_its_limits(gpu_template):
    container = pod(gpu_template, gpus=8)["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_kubernetes_pod_has_shared_memory_of_the_given_size(gpu_template):
    spec = pod(gpu_template, shm_size="32Gi")
    mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}


def test_kubernetes_pod_has_the_home_folder_on_the_shared_claim_or_on_what_was_given(gpu_template):
    own = {"name": "home", "emptyDir": {"sizeLimit": "200Gi"}}
    for spec, volume in (
        (pod(gpu_template), {"name": "home", "persistentVolumeClaim": {"claimName": "posttrain"}}),
        (pod(gpu_template, home_volume=own), own),
    ):
        mount = next(m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "home")
        assert volume in spec["volumes"]
        assert spec["containers"][0]["env"]["POSTTRAIN_HOME"] == mount["mountPath"]


def test_kubernetes_pod_takes_its_secrets_from_a_secret_and_the_template_holds_none(gpu_template):
    assert pod(gpu_template, secret="ours")["containers"][0]["envFrom"] == [{"secretRef": {"name": "ours"}}]
    plain = read(gpu_template)["variables"]["properties"]["env"]["default"]
    assert not [name for name in plain if re.search("AUTH|PASSWORD|TOKEN|SECRET|KEY", name)]


def test_kubernetes_image_has_no_default_because_prefect_s_own_has_no_environment_of_ours(gpu_template):
    variables = read(gpu_template)["variables"]
    assert "image" in variables["required"] and "default" not in variables["properties"]["image"]
