"""The merge certificate holds for what profiles allow, and each way to spoil a merged checkpoint is refused with its reason."""

import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_recipe import LORA, TRAIN
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from tasks.jobs import without_vllm  # noqa: F401  (before any trainer is imported)
from tasks.jobs.certificate import certify

pytestmark = pytest.mark.job

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
ADAPTERS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"[vo]_proj": 5}},
    "modules_to_save": {"modules_to_save": ["norm"]},
}


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): t for name, t in load_file(f"{folder}/adapter_model.safetensors").items()}


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def write(folder, tensors, name="model") -> None:
    save_file(tensors, Path(folder) / f"{name}.safetensors", metadata={"format": "pt"})


# --- adapters that profiles allow


@pytest.fixture(scope="session")
def trained(made, tmp_path_factory):
    """A function that returns an SFT adapter of three steps with other LoRA settings; each is trained once."""
    from tasks.job_spec import JobSpec
    from tasks.jobs import sft

    done = {}

    def train(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            (folder / "output").mkdir()
            config = {"dtype": "float32", "base_digest": "tiny", "lora": LORA | ADAPTERS[name]}
            sft.main(
                JobSpec(
                    stage="sft",
                    module="tasks.jobs.sft",
                    seed=1,
                    inputs={"base_model": str(made / "base_model"), "rows": str(made / "sft")},
                    config=config | {"args": TRAIN | {"learning_rate": 5e-3}},
                    output=folder / "output",
                    work=folder,
                    checkpoints=folder / "checkpoints",
                )
            )
            done[name] = folder / "output"
        return done[name]

    return train


def merged_by_hand(name, base, adapter, lora) -> torch.Tensor:
    """W + s B A, its rows scaled to DoRA's magnitudes; or what modules_to_save has instead of it."""
    stem = name.removesuffix(".weight")
    if f"{stem}.lora_A.weight" not in adapter:
        return adapter.get(name, base[name])
    a, b = adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"]
    alpha = 5 if "alpha_pattern" in lora and stem.endswith(("v_proj", "o_proj")) else 16
    rank = {"q_proj": 4, "1.mlp.down_proj": 2} if "rank_pattern" in lora else {}
    rank = next((r for end, r in rank.items() if stem.endswith(end)), 8)
    weight = base[name] + alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank) * b @ a
    if lora.get("use_dora"):
        weight *= (adapter[f"{stem}.lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
    return weight


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_tensor_of_an_allowed_adapter_trains_and_merges_to_the_formula(name, trained, spec, made):
    from tasks.jobs import merge

    folder, lora = trained(name), ADAPTERS[name]
    base, adapter = tensors_of(made / "base_model"), adapter_of(folder)
    for key, tensor in adapter.items():
        stem = key.rpartition(".")[0]
        start = base.get(key, base.get(f"{stem}.weight", torch.zeros(1)))  # B starts at 0, a magnitude at its row's norm
        start = start.norm(dim=1) if "magnitude" in key else start if key in base else torch.zeros_like(tensor)
        assert not torch.allclose(tensor, start, atol=1e-6), key
    job = spec("merge", None, {"policy": str(folder)})
    result = merge.main(job)
    merged = tensors_of(job.output)
    for key in base:
        assert torch.allclose(merged[key], merged_by_hand(key, base, adapter, lora), atol=1e-6), key
    assert result.metrics["num_adapted"] == sum("lora_A" in key for key in adapter) + sum(key in base for key in adapter)
    assert result.metrics["num_changed"] == result.metrics["num_adapted"]
    assert result.metrics["worst_weight_ratio"] <= 1


@pytest.mark.parametrize("name", ["dora", "modules_to_save"])
def test_dpo_goes_on_with_every_tensor_of_the_sft_adapter_and_from_its_policy(name, trained, spec):
    from tasks.jobs import dpo, merge

    args = {"per_device_train_batch_size": 16, "max_steps": 2, "gradient_checkpointing": False, "max_length": 64}
    inputs = {"sft": str(trained(name))}
    job = spec("dpo", "preference", inputs, lora=None, args=args | {"learning_rate": 1e-3, "beta": 0.1})
    dpo.main(job)
    losses = [json.loads(line)["metrics"]["loss"] for line in job.metrics_file.read_text().splitlines()[:1]]
    assert losses == [pytest.approx(math.log(2), abs=1e-6)]  # policy = reference: what modules_to_save has is in both
    before, after = adapter_of(trained(name)), adapter_of(job.output)
    assert before.keys() == after.keys()
    assert not [key for key in before if torch.equal(before[key], after[key])]
    merge.main(spec("merge", None, {"policy": str(job.output)}))


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


# --- adapters that cannot be merged are refused before they are trained


@pytest.mark.parametrize(
    ("lora", "names"),
    [
        ({"modules_to_save": ["lm_head"]}, "ties the two"),
        ({"modules_to_save": ["embed_tokens"]}, "ties the two"),
        ({"target_modules": ["q_proj", "lm_head"]}, "ties the two"),
        ({"modules_to_save": ["norm", "lm_hed"]}, "lm_hed"),
        ({"rank_pattern": {"q_porj": 4}}, "rank_pattern has 'q_porj'"),
        ({"alpha_pattern": {"layers.7.mlp": 4}}, "alpha_pattern has 'layers.7.mlp'"),
    ],
)
def test_sft_refuses_an_adapter_that_could_not_be_merged(lora, names, spec):
    from tasks.jobs import sft

    job = spec("sft", "sft", lora=LORA | lora, args=TRAIN | {"learning_rate": 5e-3, "loss_type": "nll"})
    with pytest.raises(RuntimeError, match=names):
        sft.main(job)
    assert not job.metrics_file.exists()  # not one step was made


def test_sft_refuses_a_chat_template_that_resizes_the_embedding(spec, made, tmp_path):
    from tasks.jobs import sft

    AutoTokenizer.from_pretrained(made / "base_model").save_pretrained(tmp_path / "template")
    args = TRAIN | {"learning_rate": 5e-3, "chat_template_path": str(tmp_path / "template")}
    with pytest.raises(RuntimeError, match="resized the embedding"):  # to the 23 tokens there are, from 32 rows
        sft.main(spec("sft", "sft", lora=LORA, args=args))


@pytest.mark.parametrize(("rows", "tokens"), [(40, None), (32, {"embed_tokens": [3]})])
def test_resized_embedding_and_trained_tokens_are_each_refused(rows, tokens, spec, made):
    from tasks.jobs.models import refuse_unmergeable

    base = AutoModelForCausalLM.from_pretrained(made / "base_model")
    base.resize_token_embeddings(rows)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=tokens)
    with pytest.raises(RuntimeError, match="added tokens or resized"):
        refuse_unmergeable(get_peft_model(base, lora), spec("sft"))


# --- the certificate


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


# --- the stage


def test_merge_of_an_adapter_of_another_base_is_refused(spec, sft_adapter, made, tmp_path):
    from tasks.jobs import merge

    moved = shutil.copytree(made / "base_model", tmp_path / "moved")
    # the same bytes elsewhere are the same base
    merge.main(spec("merge", None, {"policy": sft_adapter, "base_model": str(moved)}))
    with pytest.raises(RuntimeError, match="was trained on"):
        merge.main(spec("other", None, {"policy": sft_adapter}, base_digest="another base"))


def scaled_adapter(source, folder, factor) -> str:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    write(folder, {name: t * factor if "lora_B" in name else t for name, t in tensors.items()}, "adapter_model")
    return str(folder)


def test_merge_of_an_untrained_adapter_and_of_one_lost_in_rounding_are_refused(spec, sft_adapter, tmp_path):
    from tasks.jobs import merge

    with pytest.raises(RuntimeError, match="it trained nothing"):
        merge.main(spec("merge", None, {"policy": scaled_adapter(sft_adapter, tmp_path / "zero", 0.0)}))
    faint = scaled_adapter(sft_adapter, tmp_path / "faint", 1e-12)
    with pytest.raises(RuntimeError, match="lost in rounding to bfloat16"):
        merge.main(spec("bfloat16", None, {"policy": faint}, dtype="bfloat16"))


def test_merge_into_a_quantised_base_is_refused_before_it_is_loaded(spec, sft_adapter, tmp_path):
    from tasks.jobs import merge

    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RuntimeError, match="Dequantise the base first"):
        merge.main(spec("merge", None, {"policy": sft_adapter, "base_model": str(tmp_path / "quantised")}))
    with pytest.raises(RuntimeError, match="Dequantise the base first"):
        certify(tmp_path / "quantised", sft_adapter, tmp_path, "float32")


def test_agreement_is_over_all_positions_of_all_probes():
    from tasks.jobs.merge import agreement

    # position 1: p = (1/2, 1/2), q = (3/4, 1/4); position 2, in another probe: both (1/4, 3/4)
    even, tilted, same = (torch.tensor([[p]]).log() for p in ([0.5, 0.5], [0.75, 0.25], [0.25, 0.75]))
    found = agreement([even, same], [tilted, same])
    assert found["kl_mean"] == pytest.approx((0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2, abs=1e-6)
    assert found["logits_max_abs_diff"] == pytest.approx(math.log(2))  # log 1/2 against log 1/4
    assert agreement([tilted, same], [same, same])["top_1_agreement"] == 0.5


def test_merged_checkpoint_that_computes_otherwise_when_loaded_again_is_refused(spec, sft_adapter):
    from tasks.jobs import merge
    from tasks.jobs.models import load_tokenizer

    job = spec("merge", None, {"policy": sft_adapter})
    probes = merge.probe_ids(load_tokenizer(job))
    (policy, kl_of_base), limits = merge.merge(job, probes), merge.LIMITS["float32"]

    def compare() -> dict[str, float]:
        return merge.agreement(policy, merge.reloaded_logits(job, probes)) | {"kl_mean_of_base": kl_of_base}

    merge.assert_agreement(compare(), limits)
    config = json.loads((job.output / "config.json").read_text())
    (job.output / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    with pytest.raises(RuntimeError, match="loaded again, differ on the probes: kl_mean"):
        merge.assert_agreement(compare(), limits)


@pytest.mark.parametrize("name", ["kl_mean", "logits_max_abs_diff", "top_1_agreement"])
def test_each_measure_of_agreement_has_its_limit(name):
    from tasks.jobs.merge import LIMITS, assert_agreement

    limits = LIMITS["bfloat16"]
    at_limit = limits | {"kl_mean_of_base": 1.0}
    assert_agreement(at_limit, limits)
    beyond = limits[name] + (-1e-3 if name == "top_1_agreement" else 1e-3)
    for value in (beyond, math.nan):
        with pytest.raises(RuntimeError, match=name):
            assert_agreement(at_limit | {name: value}, limits)


def test_merged_checkpoint_no_nearer_to_the_policy_than_the_base_is_refused():
    from tasks.jobs.merge import LIMITS, assert_agreement

    logits = {"kl_mean": 0.009, "kl_mean_of_base": 0.008, "logits_max_abs_diff": 1.0, "top_1_agreement": 1.0}
    with pytest.raises(RuntimeError, match="as far from the policy as the base"):
        assert_agreement(logits, LIMITS["bfloat16"])


def merge_twice(small, big) -> None:
    """Merge a small model first, so that the libraries' own memory is there; then the big one, from a peak set back."""
    from tasks.jobs import merge

    merge.main(small)
    Path("/proc/self/clear_refs").write_text("5")
    merge.main(big)


def test_merge_of_a_sharded_checkpoint_holds_one_copy_of_its_weights(spec, made, sft_adapter, tmp_path):
    """Loading maps the file, and the sum replaces its pages: 100 MB of weights took 112. A second copy would make it 200."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 7, "num_attention_heads": 8}
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **shape))
    base.save_pretrained(tmp_path / "base", max_shard_size="30MB")
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    for folder in ("base", "adapter"):
        AutoTokenizer.from_pretrained(made / "base_model").save_pretrained(tmp_path / folder)
    shutil.copy(f"{sft_adapter}/base.json", tmp_path / "adapter")
    del base, model
    inputs = {"policy": str(tmp_path / "adapter"), "base_model": str(tmp_path / "base")}
    jobs = spec("small", None, {"policy": sft_adapter}), spec("big", None, inputs)
    process = multiprocessing.get_context("fork").Process(target=merge_twice, args=jobs)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    certificate = json.loads((jobs[1].output / "certificate.json").read_text())
    assert certificate["weights_bytes"] > 99e6
    assert certificate["weights_bytes"] < certificate["peak_memory_bytes"] < 1.4 * certificate["weights_bytes"]
