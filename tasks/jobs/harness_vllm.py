"""lm-eval's vLLM backend: each compared model in an engine of its own, one after the other, with the device to itself."""

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.model import LM
from peft import PeftModel

from tasks.job_spec import JobSpec
from tasks.jobs.harness import Measured, Tasks, run_tasks
from tasks.jobs.models import load_base, on_cpu, own_dtype
from tasks.vllm_server import server_environment


def measure(tasks: Tasks, spec: JobSpec, chat: bool) -> dict[str, Measured]:
    """Return each model's results by its name; call before any weights are loaded here.

    Raises RuntimeError for a score that is no finite number, and whatever vLLM raises for a model that it cannot load.
    """
    found = {}
    with whole_models(spec) as models:
        for name, (folder, tokenizer) in models.items():
            dtype = own_dtype(folder) if name in ("policy", "champion") else spec.config["dtype"]
            with engine(folder, tokenizer, dtype, spec.seed) as model:
                found[name] = run_tasks(tasks, model, spec.config, seed=spec.seed, chat=chat)
    return found


@contextmanager
def whole_models(spec: JobSpec) -> Iterator[dict[str, tuple[str, str]]]:
    """Yield each model's folder of full weights and its tokenizer's.

    SFT is merged into the base for the time of this block: with an adapter vLLM 0.27.1 fails on the log probabilities of a
    prompt, which multiple choice is judged by.
    """
    inputs, scratch = spec.inputs, spec.work / "merged_sft"
    shared = inputs["policy"]
    found = {"base": (inputs["base_model"], shared)}
    if sft := inputs.get("sft"):
        PeftModel.from_pretrained(load_base(spec), sft).merge_and_unload().save_pretrained(scratch)
        found["sft"] = (str(scratch), shared)
    found["policy"] = (inputs["merge"], shared)
    if champion := inputs.get("champion"):
        found["champion"] = (champion, champion)
    try:
        yield found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def engine(folder: str, tokenizer: str, dtype: str, seed: int) -> Iterator[LM]:
    """Yield lm-eval's model on a vLLM engine; its process, and with it the device's memory, is gone afterwards."""
    settings: dict[str, Any] = {"dtype": dtype, "seed": seed, "enforce_eager": on_cpu()}
    with outside_of_the_launcher(), vllm_has_a_version():
        from lm_eval.models.vllm_causallms import VLLM

        class Greedy(VLLM):
            """Decodes greedily where a task says nothing of sampling: lm-eval 0.4.13 leaves it to vLLM, which then samples."""

            @staticmethod
            def modify_gen_kwargs(gen_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                silent = "do_sample" not in gen_kwargs and not gen_kwargs.get("temperature")
                return VLLM.modify_gen_kwargs(gen_kwargs | ({"do_sample": False} if silent else {}), *args, **kwargs)

        # a base's own generation_config may hold other EOS ids than the tokenizer that all of them speak with
        model = Greedy(pretrained=folder, tokenizer=tokenizer, generation_config="vllm", **settings)
        try:
            yield model
        finally:
            model.model.llm_engine.engine_core.shutdown()


@contextmanager
def vllm_has_a_version() -> Iterator[None]:
    """Answer lm-eval's question for the version of a distribution `vllm`: the CPU build's has another name."""
    import vllm

    installed = importlib.metadata.version
    importlib.metadata.version = lambda name: vllm.__version__ if name == "vllm" else installed(name)
    try:
        yield
    finally:
        importlib.metadata.version = installed


@contextmanager
def outside_of_the_launcher() -> Iterator[None]:
    """Hide the launcher's ranks, which vLLM would take for its own."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(server_environment(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
