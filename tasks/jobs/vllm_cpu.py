"""Makes TRL's colocated vLLM work on the CPU build of vLLM, whose weight sync would otherwise silently do nothing.

vLLM's CPU linear layers pack their weights for oneDNN once and ignore later `load_weights` calls. Keeping plain weights
makes the sync real; the trainer's `sampling/sampling_logp_difference/mean` shows it (1e-6 with it, growing without).
"""

import functools
import os
from typing import Any

from tasks.jobs.models import on_cpu


def prepare(dtype: str) -> None:
    """Set vLLM up for TRL in this process; call before trl's trainers are imported."""
    set_environment()
    import trl.generation.vllm_generation as generation
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _keep_plain_weights
    generation.LLM = functools.partial(generation.LLM, dtype=dtype, enforce_eager=True)


def set_environment() -> None:
    """Keep vLLM's engine in this process, small and quiet; call before vllm is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _keep_plain_weights(layer: Any, remove_weight: bool) -> None:
    import torch

    layer.cpu_linear = torch.nn.functional.linear


def obstacle(head_dim: int) -> str | None:
    """Return why vLLM cannot generate for a model of this head size here, or None."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        return f"vllm cannot be imported ({error})"
    if on_cpu() and head_dim % 16:
        return f"vLLM's CPU attention refuses head_dim {head_dim}"
    return None
