"""The merge certificate: what a merged checkpoint must be, computed anew from the files of base and adapter alone.

PEFT merges; nothing of PEFT's merge is used here. Weights are read a tensor at a time, and computed a block of rows at a time.

An adapted weight is W' = W + s·B·A with s = alpha / r, or alpha / √r for rsLoRA (arXiv:2312.03732); DoRA (arXiv:2402.09353)
scales each row of that to its magnitude: m·W' / ‖W'‖. W is the base's weight in the asked dtype, which is what was trained on.
The expected value E is computed in float64. PEFT computes in float32 and rounds once to the asked dtype, so what it wrote must
lie in [round(E - e), round(E + e)], where e bounds the error of float32 (`Update.expected`). In bfloat16 that interval is one
number for all but about one weight in a million: a stored weight that is one bit off is found there, and in float32 one that
is off by more than e, some 1e-6 of the weight and its summands. 1e-2 added to a weight below 0.85 is found in both.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

EPS = torch.finfo(torch.float32).eps  # 2^-23, twice the error of one operation in float32
BLOCK = 1 << 17  # weights of a block: some ten float64 tensors of this size, 10 MB in all, are alive at once
# What says how the adapter acts, and what says nothing about its weights; any other field must have PEFT's own default.
FACTS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
NEUTRAL = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version", "auto_mapping"}
NEUTRAL |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"}
LORA_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B)(\.weight)?")

Files = dict[str, Path]  # each tensor's name and the file that has it


@dataclass(frozen=True)
class Update:
    """LoRA's change of one weight: A (r, in), B (out, r), DoRA's magnitude (out), and whether the file has (in, out)."""

    scale: float
    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    is_transposed: bool

    @property
    def shape(self) -> list[int]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        return [columns, rows] if self.is_transposed else [rows, columns]

    def expected(self, weight: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the merged rows from `start` on of `weight` (rows, in) in float64, and how far float32 may be from each.

        A product of r terms, the scaling and the sum err by at most (r + 4) EPS of |W| + s |B||A| (Higham, "Accuracy and
        Stability of Numerical Algorithms", §3.5); a norm of n terms by √n EPS of itself, the probabilistic bound
        (Higham and Mary, 2019), and by what its terms err.
        """
        rank, width = self.a.shape
        a, b = self.a.double(), self.b[start : start + len(weight)].double()
        merged = weight + self.scale * (b @ a)
        error = (rank + 4) * EPS * (weight.abs() + abs(self.scale) * (b.abs() @ a.abs()))
        if self.magnitude is None:
            return merged, error
        norm = merged.norm(dim=1, keepdim=True)
        factor = self.magnitude[start : start + len(weight), None].double() / norm
        relative = (math.sqrt(width) + 4) * EPS + error.norm(dim=1, keepdim=True) / norm
        return merged * factor, (error + merged.abs() * relative) * factor.abs()


@dataclass(frozen=True)
class Adapter:
    """An adapter's config, its update of each adapted weight, and by name its keys of whole tensors.

    Those of modules_to_save replace the base's; beside LoRA of an embedding or head PEFT keeps a copy of the base's.
    """

    config: dict[str, Any]
    updates: dict[str, Update]
    replaced: dict[str, str]
    copies: dict[str, str]
    path: Path


@dataclass
class Tally:
    """What the certificate says of all changed tensors together."""

    num_changed: int = 0
    worst: dict[str, Any] = field(default_factory=lambda: {"tensor": None, "error": 0.0, "limit": 0.0, "ratio": -1.0})
    rounding: float = 0.0  # Σ (M - E)²
    update: float = 0.0  # Σ (E - W)²


def certify(base_dir: Path, adapter_dir: Path, merged_dir: Path, dtype: str) -> dict[str, Any]:
    """Return the certificate of what was written to `merged_dir`; raises RuntimeError with the first reason against it."""
    refuse_quantised(base_dir)
    base, merged, adapter = tensor_files(base_dir), tensor_files(merged_dir), read_adapter(adapter_dir)
    _assert_nothing_beside(merged_dir, merged)
    _assert_vocabulary(base_dir, merged_dir, merged)
    _assert_same_tensors(base_dir, base, merged_dir, merged)
    _assert_dtypes(base, merged, merged_dir, dtype)
    if dropped := sorted((adapter.updates.keys() | adapter.replaced.keys()) - merged.keys()):
        raise RuntimeError(f"the adapter changes {dropped[0]}, which the merged checkpoint does not have: it was dropped")
    for name, key in adapter.copies.items():
        if not _is_equal(name, base, key, {key: adapter.path}):
            raise RuntimeError(f"the adapter has a copy of the base's {name} that differs: it was trained on another base")
    tally = Tally()
    for name in merged:
        if name in adapter.updates:
            _check_adapted(name, adapter.updates[name], base, merged, tally)
        else:
            _check_copied(name, adapter, base, merged, tally)
    _assert_changed(tally, adapter, dtype)
    return {
        "dtype": dtype,
        "adapter": {name: adapter.config[name] for name in FACTS},
        "num_tensors": len(merged),
        "num_adapted": len(adapter.updates) + len(adapter.replaced),
        "num_changed": tally.num_changed,
        "worst_weight": tally.worst,
        "update_rounding_ratio": math.sqrt(tally.rounding / tally.update) if tally.update else 0.0,
    }


def refuse_quantised(base_dir: Path) -> None:
    """Raise RuntimeError where the base is quantised: its stored numbers are not the weights that the adapter adds to."""
    if json.loads((Path(base_dir) / "config.json").read_text()).get("quantization_config"):
        raise RuntimeError(
            f"config.json of the base {base_dir} has a quantization_config: an adapter cannot be added to quantised weights. "
            "Dequantise the base first, and train on and merge into that."
        )


def tensor_files(folder: Path) -> Files:
    """Return which file has each tensor of a checkpoint: model.safetensors, or the shards of its index."""
    single, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    if not index.is_file():
        raise RuntimeError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    listed = {name: Path(folder) / shard for name, shard in json.loads(index.read_text())["weight_map"].items()}
    if missing := sorted({path.name for path in listed.values() if not path.is_file()}):
        raise RuntimeError(f"the shard {missing[0]} is named in the index of {folder}, and there is no such file")
    stored = {name: path for path in sorted(set(listed.values())) for name in _names(path)}
    if odd := sorted(name for name in listed.keys() | stored.keys() if listed.get(name) != stored.get(name)):
        raise RuntimeError(f"{odd[0]} is not in the shard of {folder} that the index names")
    return stored


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _shape(name: str, files: Files) -> list[int]:
    with safe_open(files[name], framework="pt") as file:
        return file.get_slice(name).get_shape()


def _dtype(name: str, files: Files) -> torch.dtype:
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name).dtype


def _blocks(name: str, files: Files, is_transposed: bool = False) -> Iterator[torch.Tensor]:
    """Yield a tensor's rows in blocks; of a transposed one its columns, as rows."""
    with safe_open(files[name], framework="pt") as file:
        tensor = file.get_tensor(name)
    tensor = tensor.T if is_transposed else tensor if tensor.ndim else tensor[None]
    yield from tensor.split(max(1, BLOCK * len(tensor) // max(1, tensor.numel())))


def read_adapter(folder: Path) -> Adapter:
    """Return the adapter; raises RuntimeError at a setting or tensor of which this file does not know what it does."""
    path = Path(folder) / "adapter_model.safetensors"
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    _assert_known(config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    replaced, copies = {}, {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (no mapping)
            name = key.removeprefix("base_model.model.")
            if lora := LORA_KEY.fullmatch(name):
                parts.setdefault(lora[1], {})[lora[2]] = file.get_tensor(key)
            elif name.endswith(".base_layer.weight"):
                copies[name.replace(".base_layer.weight", ".weight")] = key
            elif any(f"{module}." in name for module in config["modules_to_save"] or ()):
                replaced[name] = key
            else:
                raise RuntimeError(f"the adapter's tensor {key} belongs neither to LoRA nor to one of modules_to_save")
    updates = {f"{module}.weight": _update(module, tensors, config) for module, tensors in parts.items()}
    return Adapter(config, updates, replaced, copies, path)


def _assert_known(config: dict[str, Any]) -> None:
    """Refuse a setting that may change the weights in a way of its own: bias, added tokens, replicated layers, PiSSA …"""
    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in NEUTRAL and name not in FACTS and (value or None) != (defaults.get(name) or None):
            raise RuntimeError(f"adapter_config.json has {name}: {value!r}, and the certificate does not know what that does")


def _update(module: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Update:
    """Return the module's update. An embedding's weight has a row for each token, its input, so it is transposed to B A."""
    kind = "lora_embedding" if "lora_embedding_A" in tensors else "lora"
    wanted = [f"{kind}_A", f"{kind}_B"] + ["lora_magnitude_vector"] * config["use_dora"]
    if sorted(tensors) != wanted:
        raise RuntimeError(f"the adapter has {sorted(tensors)} for {module}, and use_dora is {config['use_dora']}")
    a, b = (tensors[name] for name in wanted[:2])
    rank = _of_pattern(config["rank_pattern"], module, config["r"])
    if a.shape[0] != rank:
        raise RuntimeError(f"the adapter's rank for {module} is {a.shape[0]}, and adapter_config.json says {rank}")
    alpha = _of_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return Update(scale, a, b, tensors.get("lora_magnitude_vector"), config["fan_in_fan_out"] or kind == "lora_embedding")


def _of_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key that is a regular expression for the end of the module's name, as PEFT does."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_adapted(name: str, update: Update, base: Files, merged: Files, tally: Tally) -> None:
    """Hold each element of one adapted weight against its interval, and add what was found to the tally."""
    if _shape(name, base) != update.shape:
        raise RuntimeError(f"the adapter's update of {name} has the shape {update.shape}, the weight {_shape(name, base)}")
    start, num_off, first, is_changed = 0, 0, "", False
    both = (_blocks(name, files, update.is_transposed) for files in (base, merged))
    for old, new in zip(*both, strict=True):
        before, found = old.to(new.dtype).double(), new.double()
        expected, error = update.expected(before, start)
        low, high = (bound.to(new.dtype).double() for bound in (expected - error, expected + error))
        off = ~((found >= low) & (found <= high))  # in this form NaN is off
        if off.any() and not num_off:
            first = _first_off(off, start, found, expected, low, high)
        num_off, is_changed = num_off + int(off.sum()), is_changed or not torch.equal(before, found)
        _add_to(tally, name, found - expected, _limit(expected, error, new.dtype), expected - before)
        start += len(new)
    tally.num_changed += is_changed
    if num_off:
        why = "" if is_changed else " The whole tensor is the base's: the adapter was not merged into it."
        raise RuntimeError(f"{name} is not base + (alpha / r) B A in {num_off} elements, the first at {first}.{why}")


def _first_off(off: torch.Tensor, start: int, *of_element: torch.Tensor) -> str:
    row, column = (int(index) for index in off.nonzero()[0])
    found, expected, low, high = (values[row, column].item() for values in of_element)
    return f"[{start + row}, {column}]: {found:.9g}, where {expected:.9g} is expected and {low:.9g} to {high:.9g} allowed"


def _limit(expected: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how far the one rounding to `dtype` and the error of float32 can take an element from its exact value."""
    info = torch.finfo(dtype)
    return info.eps / 2 * expected.abs().clamp(min=info.smallest_normal) + error


def _add_to(tally: Tally, name: str, error: torch.Tensor, limit: torch.Tensor, update: torch.Tensor) -> None:
    ratio = (error.abs() / limit).flatten()
    at = int(ratio.argmax())
    if ratio[at] > tally.worst["ratio"]:
        numbers = {"error": error.flatten()[at].abs(), "limit": limit.flatten()[at], "ratio": ratio[at]}
        tally.worst = {"tensor": name} | {key: value.item() for key, value in numbers.items()}
    tally.rounding += error.square().sum().item()
    tally.update += update.square().sum().item()


def _check_copied(name: str, adapter: Adapter, base: Files, merged: Files, tally: Tally) -> None:
    """Hold one tensor that LoRA does not touch against the base's, or the adapter's where that replaces it."""
    if name not in adapter.replaced:
        if not _is_equal(name, base, name, merged):
            raise RuntimeError(f"{name} is no adapted tensor, and it is not bit for bit the base's")
        return
    key = adapter.replaced[name]
    if not _is_equal(key, {key: adapter.path}, name, merged):
        raise RuntimeError(f"{name} is of modules_to_save, and it is not bit for bit the adapter's")
    tally.num_changed += not _is_equal(name, base, name, merged)


def _is_equal(key: str, source: Files, name: str, merged: Files) -> bool:
    """Tell whether one tensor is another cast to its dtype, bit for bit (0.0 is not -0.0, and NaN is NaN)."""
    if _shape(key, source) != _shape(name, merged):
        return False
    both = zip(_blocks(key, source), _blocks(name, merged), strict=True)
    return all(torch.equal(_bits(old.to(new.dtype)), _bits(new)) for old, new in both)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _assert_nothing_beside(merged_dir: Path, merged: Files) -> None:
    if strays := sorted({path.name for path in Path(merged_dir).glob("*.safetensors")} - {p.name for p in merged.values()}):
        raise RuntimeError(f"{strays[0]} lies beside the merged checkpoint and is no part of it: a loader may take it for one")


def _assert_same_tensors(base_dir: Path, base: Files, merged_dir: Path, merged: Files) -> None:
    """Refuse other names or shapes than the base's. A tied head may be stored or left out, but it must stay tied."""
    (embedding, head, is_tied), is_tied_now = embeddings(base_dir), embeddings(merged_dir)[2]
    if is_tied_now != is_tied:
        raise RuntimeError(f"tie_word_embeddings is {is_tied_now} in the merged config.json, and {is_tied} in the base's")
    missing, extra = base.keys() - merged.keys(), merged.keys() - base.keys()
    if is_tied and head in extra:
        raise RuntimeError(f"{head} is tied to {embedding} in the base, and untied in the merged checkpoint: it has its own")
    if is_tied and head in missing and _is_equal(head, base, embedding, base):
        missing -= {head}
    if missing or extra:
        raise RuntimeError(
            f"the merged checkpoint lacks the base's {sorted(missing)[:3]} and has {sorted(extra)[:3]} beyond it"
        )
    for name in merged:
        if _shape(name, base) != _shape(name, merged):
            raise RuntimeError(f"{name} has the shape {_shape(name, merged)}, and in the base {_shape(name, base)}")


def skeleton(folder: Path) -> torch.nn.Module:
    """Return the checkpoint's model without its weights: the names and properties of its parts."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def embeddings(folder: Path) -> tuple[str, str, bool]:
    """Return the names of the input embedding's weight and of the head's, and whether the config ties them."""
    model = skeleton(folder)
    name_of = {module: name for name, module in model.named_modules()}
    embedding, head = (f"{name_of[part]}.weight" for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    return embedding, head, bool(model.config.get_text_config().tie_word_embeddings)


def _assert_dtypes(base: Files, merged: Files, merged_dir: Path, dtype: str) -> None:
    """Refuse a tensor or a config of another dtype than the asked one; some architectures keep some tensors in float32."""
    asked, in_float32 = getattr(torch, dtype), skeleton(merged_dir)._keep_in_fp32_modules_strict or ()
    for name in merged:
        stored, original = _dtype(name, merged), _dtype(name, base)
        kept = torch.float32 if any(part in name for part in in_float32) else asked
        if stored != (kept if original.is_floating_point else original):
            raise RuntimeError(f"{name} is stored in {stored}, and {dtype} was asked for")
    if (said := AutoConfig.from_pretrained(merged_dir).dtype) != asked:
        raise RuntimeError(f"config.json of the merged checkpoint says {said}, and {dtype} was asked for: vLLM would cast it")


def _assert_vocabulary(base_dir: Path, merged_dir: Path, merged: Files) -> None:
    """Refuse a tokenizer with tokens that have no row, or that the base's tokenizer has not: nobody trained their rows."""
    name, ours = embeddings(merged_dir)[0], AutoTokenizer.from_pretrained(merged_dir).get_vocab()
    last, rows = max(ours, key=ours.get), _shape(name, merged)[0] if name in merged else 0
    if ours[last] >= rows:
        raise RuntimeError(f"the tokenizer has the token {last!r} with the id {ours[last]}, and {name} has {rows} rows")
    theirs = AutoTokenizer.from_pretrained(base_dir).get_vocab()
    if odd := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        raise RuntimeError(
            f"the token {odd[0]!r} has the id {ours.get(odd[0])}, and in the base's tokenizer {theirs.get(odd[0])}"
        )


def _assert_changed(tally: Tally, adapter: Adapter, dtype: str) -> None:
    """Refuse an adapter that adds nothing, and one of which nothing is left after rounding."""
    is_zero = all(not (update.a.any() and update.b.any()) for update in adapter.updates.values())
    if is_zero and not (adapter.replaced and tally.num_changed):
        raise RuntimeError("B A is zero in every module of the adapter: it trained nothing, and the merged model is the base")
    if not tally.num_changed:
        raise RuntimeError(f"the merged weights equal the base: all of the adapter is lost in rounding to {dtype}")
