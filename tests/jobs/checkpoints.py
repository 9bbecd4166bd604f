"""Reads and writes the files of tiny checkpoints and adapters."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): t for name, t in load_file(f"{folder}/adapter_model.safetensors").items()}


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def write(folder, tensors, name="model") -> None:
    save_file(tensors, Path(folder) / f"{name}.safetensors", metadata={"format": "pt"})
