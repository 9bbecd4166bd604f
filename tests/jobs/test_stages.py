"""Each stage on its own, really run on a tiny model: what it leaves, and that what should move moved and nothing else."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import LORA, TRAIN

from tasks.jobs import without_vllm  # noqa: F401  (before any trainer is imported)

pytestmark = pytest.mark.job


def logged(spec) -> list[dict]:
    return [json.loads(line)["metrics"] for line in spec.metrics_file.read_text().splitlines()]


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/adapter_model.safetensors")


def test_sft_trains_every_adapter_tensor_and_logs_trl_keys(spec):
    from tasks.jobs import sft

    job = spec("sft", "sft", lora=LORA, args=TRAIN | {"learning_rate": 5e-3})
    result = sft.main(job)
    tensors = adapter_of(job.output)
    # LoRA starts at B = 0: a B that is not 0 was trained.
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert {"loss", "mean_token_accuracy", "entropy", "grad_norm"} <= set(logged(job)[0])
    assert result.metrics["loss"] > 0


def test_adapter_is_the_same_bytes_wherever_it_was_trained(spec, made):
    """No path of this machine, and no set in the order of its process: what follows keys on these bytes."""
    from tasks.jobs import sft

    job = spec("sft", "sft", lora=LORA, args=TRAIN | {"learning_rate": 5e-3})
    sft.main(job)
    texts = {path.name: path.read_bytes() for path in job.output.iterdir()}
    assert not [name for name, text in texts.items() if str(made).encode() in text or str(job.output).encode() in text]
    modules = json.loads(texts["adapter_config.json"])["target_modules"]
    assert modules == sorted(modules) and len(modules) > 1
    assert "README.md" not in texts


def test_dpo_says_how_many_rows_trl_left_out(spec, sft_adapter):
    from tasks.jobs import dpo

    args = {"per_device_train_batch_size": 4, "max_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-3}
    whole = dpo.main(spec("dpo", "preference", {"sft": sft_adapter}, lora=None, args=args | {"max_length": 64}))
    assert whole.metrics["data/dropped_rows"] == 0
    # prompts have 14 to 17 tokens, by their 4 to 7 digits: with 16 those of 6 and 7 digits leave no room for a reply
    cut = dpo.main(spec("cut", "preference", {"sft": sft_adapter}, lora=None, args=args | {"max_length": 16}))
    assert 0 < cut.metrics["data/dropped_rows"] < 128


def test_sft_with_a_learning_rate_of_0_is_an_error(spec):
    from tasks.jobs import sft

    with pytest.raises(RuntimeError, match="changed no tensor"):
        sft.main(spec("sft", "sft", lora=LORA, args=TRAIN | {"learning_rate": 0.0}))


def test_reward_model_leaves_a_standalone_checkpoint_that_separates_held_out_pairs(spec):
    from transformers import AutoModelForSequenceClassification

    from tasks.jobs import reward_model

    job = spec("reward_model", "preference", lora=None, eval_ratio=0.25, args=TRAIN | {"learning_rate": 3e-3, "max_steps": 12})
    result = reward_model.main(job)
    assert result.details["held_out_pairs"] == 32  # a quarter of 128 pairs, of as many prompts
    assert 0 <= result.metrics["eval_accuracy"] <= 1
    assert AutoModelForSequenceClassification.from_pretrained(job.output).config.num_labels == 1


def test_dpo_starts_at_ln_2_because_its_reference_is_the_sft_adapter(spec, sft_adapter):
    from tasks.jobs import dpo

    args = {"per_device_train_batch_size": 16, "max_steps": 2, "gradient_checkpointing": False, "max_length": 64}
    job = spec("dpo", "preference", {"sft": sft_adapter}, lora=None, args=args | {"learning_rate": 1e-3, "beta": 0.1})
    dpo.main(job)
    # policy = reference gives a margin of 0 for every pair, and -log sigmoid(0) = ln 2 (arXiv:2305.18290, eq. 7)
    assert logged(job)[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert adapter_moved(sft_adapter, job.output)


def test_kto_starts_at_a_half_because_its_reference_is_the_sft_adapter(spec, sft_adapter):
    from tasks.jobs import kto

    args = {"per_device_train_batch_size": 16, "max_steps": 2, "gradient_checkpointing": False, "max_length": 64}
    job = spec("kto", "unpaired", {"sft": sft_adapter}, lora=None, args=args | {"learning_rate": 1e-3, "beta": 0.1})
    result = kto.main(job)
    # policy = reference gives log-ratios and a KL of 0, and 1 - sigmoid(0) is a half for either label (arXiv:2402.01306, eq. 7)
    first = logged(job)[0]
    assert (first["loss"], first["kl"]) == (pytest.approx(0.5, abs=1e-6), pytest.approx(0.0, abs=1e-5))
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "entropy"} <= set(first)
    assert adapter_moved(sft_adapter, job.output) and result.metrics["data/dropped_rows"] == 0


def test_kto_of_rows_sorted_by_their_label_has_both_labels_in_a_batch(spec, sft_adapter, made, tmp_path):
    from tasks.jobs import kto

    (tmp_path / "sorted").mkdir()
    table = pq.read_table(made / "unpaired" / "rows.parquet").sort_by("label")
    pq.write_table(table, tmp_path / "sorted" / "rows.parquet")
    args = {"per_device_train_batch_size": 16, "max_steps": 1, "gradient_checkpointing": False, "max_length": 64}
    rows = {"rows": str(tmp_path / "sorted")}
    job = spec("kto", "unpaired", {"sft": sft_adapter} | rows, lora=None, args=args | {"learning_rate": 1e-3})
    kto.main(job)
    assert {"rewards/chosen", "rewards/rejected"} <= set(logged(job)[0])


def test_rloo_logs_kl_to_the_sft_policy_which_is_0_before_the_first_update(spec, sft_adapter):
    from tasks.jobs import rloo

    rewards = [{"name": "near_answer", "weight": 1.0}]
    job = spec("rloo", "prompts", {"sft": sft_adapter}, lora=None, reward_functions=rewards, args=grpo_args())
    rloo.main(job)
    first = logged(job)[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert {"reward", "reward_std", "frac_reward_zero_std", "entropy", "rewards/near_answer/mean"} <= set(first)
    assert adapter_moved(sft_adapter, job.output)


def grpo_args(**more):
    own = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    return own | {"gradient_checkpointing": False, "learning_rate": 1e-3, "beta": 0.1} | more


def adapter_moved(before, after) -> bool:
    """The policy's adapter is another than the one it started from, and TRL's frozen copy "ref" is not saved with it."""
    old, new = adapter_of(before), adapter_of(after)
    assert old.keys() == new.keys()
    return any(not torch.equal(old[name], new[name]) for name in old)


def test_grpo_logs_kl_to_the_sft_policy_which_is_0_before_the_first_update(spec, sft_adapter):
    from tasks.jobs import grpo

    rewards = [{"name": "near_answer", "weight": 1.0}]
    job = spec(
        "grpo", "prompts", {"sft": sft_adapter}, lora=None, rollouts="transformers", reward_functions=rewards, args=grpo_args()
    )
    result = grpo.main(job)
    first = logged(job)[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert {"reward", "reward_std", "frac_reward_zero_std", "entropy", "rewards/near_answer/mean"} <= set(first)
    assert adapter_moved(sft_adapter, job.output)
    assert result.details["rollouts"] == "transformers"


def test_grpo_reward_model_is_named_so_in_the_metrics_and_enters_the_reward_with_its_weight(spec, sft_adapter):
    from tasks.jobs import grpo, reward_model

    scored = spec("reward_model", "preference", lora=None, eval_ratio=0.25, args=TRAIN | {"learning_rate": 3e-3})
    reward_model.main(scored)
    rewards = [{"name": "near_answer", "weight": 1.0}, {"name": "reward_model", "weight": 0.5}]
    job = spec(
        "grpo", "prompts", {"sft": sft_adapter, "reward_model": str(scored.output)}, lora=None, rollouts="transformers",
        reward_functions=rewards, args=grpo_args(max_steps=1),
    )  # fmt: skip
    grpo.main(job)
    line = logged(job)[0]
    # the reward is the weighted sum of the reward functions' values, so its mean is that of their means
    expected = line["rewards/near_answer/mean"] + 0.5 * line["rewards/reward_model/mean"]
    assert line["reward"] == pytest.approx(expected, abs=1e-5)
