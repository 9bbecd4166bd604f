"""Each way to spoil a merged checkpoint is refused by its certificate, with its reason."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import tensors_of, write
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_recipe import LORA
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from tasks.jobs.certificate import certify

pytestmark = pytest.mark.job

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "embeddings"])
def test_certificate_knows_transposed_weights_and_embeddings(kind, use_dora, made, tmp_path):
    torch.manual_seed(0)
    if kind == "gpt2":  # its Conv1D keeps (in, out), and its head is tied
        config = GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=2, n_positions=64)
        lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=use_dora)
    else:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=32, tie_word_embeddings=False, **shape)
        lora = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], use_dora=use_dora)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ("base", "merged"):
        AutoTokenizer.from_pretrained(made / "base_model").save_pretrained(tmp_path / folder)
    certificate = certify(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "float32")
    assert certificate["num_changed"] == certificate["num_adapted"] == 3


@pytest.fixture(scope="session")
def released(made, sft_adapter, tmp_path_factory):
    """Merged checkpoints of the same adapter in both dtypes, as PEFT writes them."""
    folder = tmp_path_factory.mktemp("released")
    for dtype in ("float32", "bfloat16"):
        base = AutoModelForCausalLM.from_pretrained(made / "base_model", dtype=getattr(torch, dtype))
        PeftModel.from_pretrained(base, sft_adapter).merge_and_unload().save_pretrained(folder / dtype)
        AutoTokenizer.from_pretrained(made / "base_model").save_pretrained(folder / dtype)
    return folder


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def merged(released, dtype, tmp_path) -> Path:
    return Path(shutil.copytree(released / dtype, tmp_path / "merged"))


@pytest.fixture
def check(made, sft_adapter, merged, dtype):
    """Certifies the merged folder; returns the certificate, or the reason against it."""

    def run(adapter=sft_adapter, base=made / "base_model") -> dict | str:
        try:
            return certify(base, adapter, merged, dtype)
        except RuntimeError as error:
            return str(error)

    return run


def change(folder, name, index, value) -> None:
    tensors = tensors_of(folder)
    tensors[name].view(-1)[index] = value(tensors[name].view(-1)[index])
    write(folder, tensors)


def test_certificate_says_what_was_merged_and_how_exactly(check, dtype):
    certificate = check()
    assert certificate["adapter"]["r"] == LORA["r"] and certificate["dtype"] == dtype
    assert certificate["num_tensors"] == 20 and certificate["num_adapted"] == certificate["num_changed"] == 14
    worst = certificate["worst_weight"]
    assert 0 < worst["error"] <= worst["limit"] < 1e-2 and worst["tensor"].endswith("proj.weight")
    # bfloat16 keeps 2^-9 of a weight, which is far more of its update; float32 2^-24
    assert 1e-9 < certificate["update_rounding_ratio"] < (1e-5 if dtype == "float32" else 0.1)


def test_adapted_weight_off_by_a_hundredth_is_found_and_named(check, merged):
    change(merged, Q_PROJ, 67, lambda value: value + 1e-2)
    assert Q_PROJ in check() and "in 1 elements, the first at [1, 3]" in check()


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_adapted_weight_off_by_one_bit_is_found_in_bfloat16(check, merged):
    tensors = tensors_of(merged)
    tensors[Q_PROJ].view(torch.int16).view(-1)[67] += 1
    write(merged, tensors)
    assert "in 1 elements, the first at [1, 3]" in check()


def test_adapted_weight_that_is_no_number_is_found(check, merged):
    change(merged, Q_PROJ, 0, lambda value: math.nan)
    assert "[0, 0]: nan" in check()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_untouched_tensor_changed_in_one_bit_is_found(check, merged, name):
    tensors = tensors_of(merged)
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    write(merged, tensors)
    assert f"{name} is no adapted tensor, and it is not bit for bit the base's" in check()


def test_zero_of_another_sign_in_an_untouched_tensor_is_found(check, merged, made, tmp_path):
    base = shutil.copytree(made / "base_model", tmp_path / "base")
    change(base, "model.norm.weight", 0, lambda _: 0.0)
    change(merged, "model.norm.weight", 0, lambda _: -0.0)
    assert "model.norm.weight is no adapted tensor" in check(base=base)
    change(merged, "model.norm.weight", 0, lambda _: 0.0)
    assert check(base=base)["num_tensors"] == 20


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_update_rounded_twice_is_found(check, merged, made, sft_adapter):
    base = AutoModelForCausalLM.from_pretrained(made / "base_model", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, sft_adapter).merge_and_unload(safe_merge=True).save_pretrained(merged)
    assert "is not base + (alpha / r) B A" in check()


def test_another_alpha_is_found(check, sft_adapter, tmp_path):
    other = shutil.copytree(sft_adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 17}))
    assert "is not base + (alpha / r) B A" in check(other)


def test_base_copied_instead_of_merged_is_found(check, merged, made, dtype):
    write(merged, {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors_of(made / "base_model").items()})
    assert "the adapter was not merged into it" in check()


def test_one_tensor_left_unmerged_is_found(check, merged, made, dtype):
    base = tensors_of(made / "base_model")[Q_PROJ].to(getattr(torch, dtype))
    write(merged, tensors_of(merged) | {Q_PROJ: base})
    assert Q_PROJ in check() and "the adapter was not merged into it" in check()


def test_missing_shard_and_a_tensor_in_another_than_the_index_says_are_found(check, merged):
    AutoModelForCausalLM.from_pretrained(merged, dtype="auto").save_pretrained(merged, max_shard_size="50KB")
    (merged / "model.safetensors").unlink()
    assert check()["num_tensors"] == 20
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    wrong = index | {"weight_map": index["weight_map"] | {Q_PROJ: shards[-1]}}
    (merged / "model.safetensors.index.json").write_text(json.dumps(wrong))
    assert f"{Q_PROJ} is not in the shard" in check()
    (merged / shards[1]).unlink()
    assert f"the shard {shards[1]} is named in the index" in check()


def test_weights_beside_the_checkpoint_are_found(check, merged):
    write(merged, {Q_PROJ: torch.zeros(2)}, "consolidated")
    assert "consolidated.safetensors lies beside" in check()


def test_tied_head_that_was_untied_is_found(check, merged):
    tensors = tensors_of(merged)
    write(merged, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert "lm_head.weight is tied to model.embed_tokens.weight in the base" in check()


def test_config_that_unties_the_head_is_found(check, merged):
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "tie_word_embeddings is False in the merged config.json" in check()


def test_tied_head_that_the_base_stores_may_be_left_out_only_where_it_is_the_embedding(check, made, tmp_path):
    base = shutil.copytree(made / "base_model", tmp_path / "base")
    tensors = tensors_of(base)
    write(base, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert check(base=base)["num_tensors"] == 20
    write(base, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    assert "lacks the base's ['lm_head.weight']" in check(base=base)


def test_missing_tensor_and_another_shape_are_found(check, merged):
    tensors = tensors_of(merged)
    write(merged, tensors | {"model.norm.weight": torch.zeros(8)})
    assert "model.norm.weight has the shape [8]" in check()
    del tensors["model.norm.weight"]
    write(merged, tensors)
    assert "lacks the base's ['model.norm.weight']" in check()


def test_another_dtype_is_found_in_the_tensors_and_in_the_config(check, merged, dtype):
    other = "bfloat16" if dtype == "float32" else "float32"
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"dtype": other}))
    assert f"says torch.{other}, and {dtype} was asked for" in check()
    write(merged, tensors_of(merged) | {Q_PROJ: tensors_of(merged)[Q_PROJ].to(getattr(torch, other))})
    assert f"{Q_PROJ} is stored in torch.{other}" in check()


def test_token_without_a_row_and_token_that_nobody_trained_are_found(check, merged):
    tokenizer = AutoTokenizer.from_pretrained(merged)
    tokenizer.add_tokens(["<|extra|>"])  # the base has rows to spare
    tokenizer.save_pretrained(merged)
    assert "'<|extra|>'" in check() and "None" in check()
    tokenizer.add_tokens([f"<|{number}|>" for number in range(9)])
    tokenizer.save_pretrained(merged)
    assert "'<|8|>' with the id 32, and model.embed_tokens.weight has 32 rows" in check()


def spoiled_adapter(source, folder, config=None, **tensors) -> Path:
    """Copy an adapter with other settings and other tensors; a name's `__` is a dot."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | (config or {})))
    whole = load_file(folder / "adapter_model.safetensors")
    write(folder, whole | {f"base_model.model.{name.replace('__', '.')}": t for name, t in tensors.items()}, "adapter_model")
    return folder


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_adapter_that_the_certificate_cannot_read_is_refused(check, sft_adapter, tmp_path):
    factors = {f"x__lora_{part}__weight": torch.ones(shape) for part, shape in (("A", (8, 4)), ("B", (4, 8)))}
    reasons = {
        "the adapter changes x.weight": ({}, factors),
        "belongs neither to LoRA": ({}, {"x__weight": torch.ones(1)}),
        "for x, and use_dora is False": ({}, {"x__lora_A__weight": torch.ones(8, 4)}),
        "trainable_token_indices": ({"trainable_token_indices": {"embed_tokens": [3]}}, {}),
        "bias: 'all'": ({"bias": "all"}, {}),
        "is 8, and adapter_config.json says 4": ({"rank_pattern": {"q_proj": 4}}, {}),
        "it was trained on another base": ({}, {"model__norm__base_layer__weight": torch.zeros(64)}),
    }
    for number, (reason, (config, tensors)) in enumerate(reasons.items()):
        assert reason in check(spoiled_adapter(sft_adapter, tmp_path / str(number), config, **tensors)), reason
