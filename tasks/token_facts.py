"""Asks the job environment, which has the tokenizer and TRL, how each trainer of a recipe will read a dataset's rows."""

import json
import os
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from data_contracts.canonical import RowsFile
from profiles.schema import Recipe, StagePlacement
from tasks.artifacts import Artifact, digest_of, disk_errors
from tasks.environment import home
from tasks.errors import JobFailed, MachineUnfit, RunCancelled
from tasks.fingerprints import code_digest, file_digest, fingerprint, library_versions
from tasks.guard import guarded
from tasks.local_job import GRACE_SECONDS, POLL_SECONDS, job_environment, job_python

MODULE = "tasks.jobs.tokenize_rows"
TRAINERS = {  # the usual one of each kind of row
    "language_modeling": "sft",
    "prompt_completion": "sft",
    "preference": "dpo",
    "unpaired_preference": "kto",
    "prompt_only": "grpo",
    "eval": "evaluate",
}
_TOKENIZER_ARGS = ("eos_token", "chat_template_path")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
_LIBRARIES = ("transformers", "tokenizers", "trl")
_ARGS = (
    *("max_length", "truncation_mode", "packing", "packing_strategy", "completion_only_loss", "assistant_only_loss"),
    *("max_completion_length", "dataset_text_field", "chat_template_kwargs"),
)


@dataclass(frozen=True)
class Use:
    """A stage that reads rows: by which of its arguments, and with what SFT makes of the tokenizer."""

    stage: str
    method: str
    args: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)


def uses_of(recipe: Recipe, name: str) -> list[Use]:
    """Return the stages that read the dataset `recipe.datasets.<name>`, of those that read it through a template."""
    changed = _only(recipe.sft.args, _TOKENIZER_ARGS) if recipe.sft else {}
    policy = Use(recipe.policy.method, recipe.policy.method, _only(recipe.policy.args, _ARGS), changed)
    if name == "sft":
        return [_reader("sft", recipe.sft.args)] if recipe.sft else []
    if name == "preference":
        reward_model = recipe.reward_model
        judge = [_reader("reward_model", reward_model.args)] if reward_model else []
        return [policy, *judge] if recipe.policy.rows == name else judge
    if name != "eval":
        return [policy] if recipe.policy.rows == name else []
    if recipe.datasets.eval.kind != "eval":
        return []
    return [Use("evaluate", "evaluate", {"max_completion_length": recipe.evaluate.max_new_tokens}, changed)]


def _reader(stage: str, args: dict[str, Any]) -> Use:
    """Return a stage that changes the tokenizer by its own arguments, as SFT and the reward model do."""
    return Use(stage, stage, _only(args, _ARGS), _only(args, _TOKENIZER_ARGS))


def usual_reader(kind: str, args: dict[str, Any]) -> Use:
    """Return how the trainer that most use for rows of this kind reads them."""
    return _reader(TRAINERS[kind], args)


@dataclass(frozen=True)
class Tokens:
    """How rows are read by each of their trainers: the base model on this machine, and its uses."""

    base: Artifact
    uses: list[Use]
    placement: StagePlacement
    stop: threading.Event = field(default_factory=threading.Event)  # ends the reading from another thread

    def identity(self) -> dict[str, Any]:
        """Return what the facts depend on besides the rows."""
        versions = library_versions(job_python(self.placement))
        return {
            "tokenizer": _tokenizer_digest(Path(self.base.path)),
            "uses": [{"stage": use.stage, **_asked(use)} for use in self.uses],
            "code": code_digest(MODULE),
            "libraries": {name: versions[name] for name in _LIBRARIES if name in versions},
        }

    def methods(self) -> dict[str, str]:
        return {use.stage: use.method for use in self.uses}

    def totals(self, facts: pd.DataFrame) -> dict[str, dict[str, int]]:
        """Return for each stage that trains how many rows and tokens its trainer must end up with."""
        trained = [use.stage for use in self.uses if f"{use.stage}_n_prepared" in facts]
        return {
            stage: {
                "rows": int((~facts[f"{stage}_is_dropped"]).sum()),
                "tokens": int(facts[f"{stage}_n_prepared"].sum()),
                "truncated": int(facts[f"{stage}_is_truncated"].sum()),
            }
            for stage in trained
        }

    def facts(self, rows: RowsFile) -> pd.DataFrame:
        """Return `row` and, named `<stage>_<fact>`, the facts about it for each use; those that are known are not asked again.

        Raises MachineUnfit if the job environment does not start, JobFailed with what it said if it fails, RunCancelled.
        """
        known = pd.read_parquet(rows.path, columns=["row"])
        identity = self.identity() | {"rows": file_digest(rows.path)}
        for use in self.uses:
            key = fingerprint(identity | {"uses": _asked(use)})
            found = pd.read_parquet(self._kept(key, use, rows.path)).set_index("row").add_prefix(f"{use.stage}_")
            known = known.join(found, on="row")
        return known

    def _kept(self, key: str, use: Use, rows: Path) -> Path:
        kept = home() / ".token_facts" / f"{key}.parquet"
        if kept.is_file():
            os.utime(kept)  # `posttrain gc` keeps what recent runs read
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, disk_errors(Path(folder)):
            made, request = Path(folder) / "facts.parquet", Path(folder) / "request.json"
            model = {"model": str(self.base.path), "context": _context(Path(self.base.path))}
            request.write_text(json.dumps(model | _asked(use) | {"rows": str(rows), "output": str(made)}))
            _run(self.placement, request, self.stop)
            partial = kept.with_name(f".{key}.{Path(folder).name}")
            partial.write_bytes(made.read_bytes())
            partial.rename(kept)
        return kept


def _run(placement: StagePlacement, request: Path, stop: threading.Event) -> None:
    """Run the job to its end; the guard ends it when this process, which holds its pipe, is gone or lets go."""
    command = guarded([str(job_python(placement)), "-m", MODULE, str(request)], GRACE_SECONDS)
    env = job_environment(placement) | {"TOKENIZERS_PARALLELISM": "true"}
    log_file = request.with_suffix(".log")
    try:
        with (
            log_file.open("w") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
            ) as process,
        ):
            while process.poll() is None and not stop.wait(POLL_SECONDS):
                pass
    except OSError as error:
        raise MachineUnfit(f"the job environment does not start: {error}. Run `posttrain doctor`.") from None
    if stop.is_set():
        raise RunCancelled("the run was interrupted while its rows were read with the model's tokenizer")
    if process.returncode != 0:
        raise JobFailed(f"the rows could not be read with the model's tokenizer: {log_file.read_text().strip()[-2000:]}")


def _asked(use: Use) -> dict[str, Any]:
    template = Path(use.tokenizer.get("chat_template_path") or "")
    digest = {"template": _tokenizer_digest(template) if template.is_dir() else file_digest(template)} if template.name else {}
    return {"method": use.method, "args": use.args, "tokenizer": use.tokenizer} | digest


def _only(args: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: args[name] for name in names if name in args}


def _context(model: Path) -> int | None:
    """Return how many tokens the model was made for, None if its config does not say."""
    config = json.loads((model / "config.json").read_text()) if (model / "config.json").is_file() else {}
    return config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")


def _tokenizer_digest(model: Path) -> str:
    """Return the digest of everything in a model's folder but its weights: templates may stand in folders of their own."""
    files = sorted(path for path in model.rglob("*") if path.is_file() and path.suffix not in _WEIGHTS)
    return digest_of({path.relative_to(model).as_posix(): file_digest(path) for path in files})
