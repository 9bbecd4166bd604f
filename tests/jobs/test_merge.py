"""Adapters that profiles allow train, go on and merge; others are refused before they are trained; one copy is in memory."""

import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import adapter_of, tensors_of, write
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_recipe import LORA, TRAIN
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tasks.jobs import without_vllm  # noqa: F401  (before any trainer is imported)
from tasks.jobs.certificate import certify

pytestmark = pytest.mark.job

ADAPTERS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"[vo]_proj": 5}},
    "modules_to_save": {"modules_to_save": ["norm"]},
}


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
    (big.work / "metrics.json").write_text(json.dumps(merge.main(big).metrics))


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
    cost = json.loads((jobs[1].work / "metrics.json").read_text())
    assert cost["weights_bytes"] > 99e6
    assert cost["weights_bytes"] < cost["peak_memory_bytes"] < 1.4 * cost["weights_bytes"]
