"""The governor and its canaries on the tiny model: what they measure, that they change nothing, and what a halt leaves."""

import json

import pytest
from tiny_recipe import TRAIN

from profiles.drift import Drift

pytestmark = [pytest.mark.job, pytest.mark.timeout(300)]

NEAR = [{"name": "near_answer", "weight": 1.0}]


def drift(**changed) -> dict:
    """The profile's drift block as a job reads it, with all signals but those given switched off."""
    signals = dict.fromkeys(Drift().signals) | changed.pop("signals", {})
    block = Drift.model_validate({"signals": signals, "kl_cusum": None, "reward_hacking": None} | changed).model_dump()
    block["canaries"] |= {"num_prompts": 8, "max_new_tokens": 8, "scorer": "exact_answer"}
    return block


@pytest.fixture
def grpo_spec(spec, sft_adapter, made):
    def make(limits: dict, **args):
        args = TRAIN | {"num_generations": 4, "max_completion_length": 8, "learning_rate": 1e-3} | args
        args.pop("max_length", None)
        inputs = {"sft": sft_adapter, "canaries": str(made / "eval")}
        job = spec("grpo", "prompts", inputs, lora=None, rollouts="transformers", reward_functions=NEAR, args=args)
        return job.model_copy(update={"drift": limits})

    return make


def logged(job) -> list[dict]:
    lines = [json.loads(line) for line in job.metrics_file.open()]
    return [line["metrics"] for line in lines if "loss" in line["metrics"]]


def test_canaries_measure_what_the_trainer_does_not_log_and_start_at_no_kl(grpo_spec):
    from tasks.jobs import grpo

    job = grpo_spec(drift(), beta=0.0, max_steps=2, learning_rate=0.0)
    with pytest.raises(RuntimeError, match="changed no tensor"):  # a learning rate of 0 trains nothing, and is refused as such
        grpo.main(job)
    line = logged(job)[0]
    assert line["kl"] == line["canary/kl"] == pytest.approx(0.0, abs=1e-6)
    assert line["entropy"] != line["canary/entropy"] > 0  # the trainer's own is of its rollouts
    assert 0 <= line["canary/reward"] <= 1 and 1 <= line["canary/length"] <= 8


def test_canaries_leave_training_as_it_is(grpo_spec, spec, made, sft_adapter):
    """The same rewards, losses and KL to the last digit, with and without them."""
    from tasks.jobs import grpo

    watched = grpo_spec(drift(), beta=0.1, max_steps=4)
    grpo.main(watched)
    curves = logged(watched)
    watched.metrics_file.unlink()
    alone = watched.model_copy(update={"inputs": {k: v for k, v in watched.inputs.items() if k != "canaries"}})
    grpo.main(alone)
    for one, other in zip(curves, logged(alone), strict=True):
        assert [one[key] for key in ("loss", "reward", "kl", "entropy")] == [
            other[key] for key in ("loss", "reward", "kl", "entropy")
        ]


def test_kl_and_entropy_are_those_of_the_full_distributions(grpo_spec, made, sft_adapter, monkeypatch):
    """The oracle: every reply of up to 2 tokens enumerated, with its probability under the policy.

    By the chain rule the expected sum of per-token KL is the KL of the two distributions over whole replies, so the mean over
    many samples of what the canaries compute must come to it.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.jobs.answers import log_probabilities, samples

    tokenizer = AutoTokenizer.from_pretrained(sft_adapter)
    base = AutoModelForCausalLM.from_pretrained(made / "base_model")
    policy = PeftModel.from_pretrained(base, sft_adapter).eval()
    prompt, length = [{"role": "user", "content": "Sort: 312"}], 2
    start = torch.tensor([tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]])
    eos, size = tokenizer.eos_token_id, policy.config.vocab_size

    def next_logp(reply: list[int]) -> torch.Tensor:
        ids = torch.cat([start, torch.tensor([reply], dtype=torch.long)], 1)
        return torch.log_softmax(policy(ids).logits[0, -1].double(), -1)

    def enumerate_replies() -> tuple[float, float]:
        """Return the exact KL of whole replies (policy against base), and the exact expected number of tokens."""
        kl = tokens = 0.0
        open_replies = [([], 1.0)]
        for _ in range(length):
            following = []
            for reply, probability in open_replies:
                now = next_logp(reply)
                with policy.disable_adapter():
                    before = next_logp(reply)
                kl += probability * float((now.exp() * (now - before)).sum())
                tokens += probability
                following += [([*reply, t], probability * float(now[t].exp())) for t in range(size) if t != eos]
            open_replies = following
        return kl, tokens

    with torch.no_grad():
        exact_kl, exact_tokens = enumerate_replies()
        torch.manual_seed(0)
        batch = samples(policy, tokenizer, [prompt] * 512, length)
        now = log_probabilities(policy, batch)
        with policy.disable_adapter():
            before = log_probabilities(policy, batch)
    estimate = float((now.exp() * (now - before)).sum(-1)[batch["mask"]].sum()) / 512
    assert batch["mask"].sum() / 512 == pytest.approx(exact_tokens, rel=0.05)
    assert estimate == pytest.approx(exact_kl, rel=0.05)


def test_left_corridor_halts_and_marks_the_last_checkpoint_inside(grpo_spec):
    """KL of a policy that moves exceeds 1e-9 at once: steps 1 and 2, with patience 2, halt at the second log step beyond."""
    from tasks.jobs import grpo
    from tasks.jobs.job import Halted

    limits = drift(signals={"kl": {"warn_max": 1e-10, "halt_max": 1e-9, "patience": 2, "smoothing": 1.0}})
    job = grpo_spec(limits, beta=0.0, max_steps=8, save_strategy="steps", save_steps=1)
    with pytest.raises(Halted, match="kl averaged .* 1e-09") as halted:
        grpo.main(job)
    curve = [line["kl"] for line in logged(job)]
    beyond = [step for step, value in enumerate(curve, start=1) if value > 1e-9]
    assert len(curve) == beyond[1] == halted.value.details["finding"]["step"]
    assert halted.value.details["last_good"] is None or halted.value.details["last_good"]["step"] < beyond[0]
    assert not list(job.output.iterdir())
    told = [f for line in map(json.loads, job.metrics_file.open()) for f in line["findings"]]
    assert [f["severity"] for f in told] == ["halt"]


def halting_late(**args) -> dict:
    """A corridor that the tiny policy leaves after some steps: its KL grows with every step at this learning rate."""
    return drift(signals={"kl": {"warn_max": None, "halt_max": 0.01, "patience": 2, "smoothing": 1.0}}, **args)


def test_rollback_leaves_the_policy_of_the_last_good_checkpoint(grpo_spec):
    from safetensors.torch import load_file

    from tasks.jobs import grpo

    job = grpo_spec(halting_late(on_halt="rollback"), beta=0.0, max_steps=30, save_strategy="steps", save_steps=1)
    result = grpo.main(job)
    step = result.details["rolled_back_to"]
    curve = [line["kl"] for line in logged(job)]
    assert len(curve) < 30 and curve[step - 1] <= 0.01 < curve[step]
    kept = load_file(job.checkpoints / f"checkpoint-{step}" / "adapter_model.safetensors")
    left = load_file(job.output / "adapter_model.safetensors")
    assert kept.keys() == left.keys() and all(kept[name].equal(left[name]) for name in kept)


def test_restart_begins_at_the_last_good_weights_with_the_same_reference(grpo_spec):
    """Its first KL is near the checkpoint's, not 0: the reference is still the policy before all training."""
    from tasks.jobs import grpo
    from tasks.jobs.job import Halted
    from tasks.restart import restarted

    job = grpo_spec(
        halting_late(on_halt="retry", retry={"change": {"learning_rate": 1e-3}}),
        beta=0.0, max_steps=30, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    with pytest.raises(Halted) as halted:
        grpo.main(job)
    job.result_file.write_text("{}")
    before = [line["kl"] for line in logged(job)]
    good = halted.value.details["last_good"]
    again = restarted(job, good, 1)
    assert again.config["args"]["learning_rate"] == pytest.approx(1e-6)
    assert again.config["args"]["max_steps"] == 30 - good["step"]
    result = grpo.main(again)
    lines = [json.loads(line) for line in job.metrics_file.open()]
    after = [line for line in lines if "loss" in line["metrics"]][len(before) :]
    assert after[0]["step"] == good["step"] + 1 and after[-1]["step"] == 30
    assert after[0]["metrics"]["kl"] == pytest.approx(before[good["step"] - 1], rel=0.1) and after[0]["metrics"]["kl"] > 0
    assert "halted" not in result.details


def test_calibration_of_a_reward_model_is_zero_where_certainty_is_accuracy():
    """Margins of ±log 3 mean a certainty of 3/4: with 3 of 4 pairs right it is calibrated, with 4 of 4 it is 1/4 off.

    Brier: (1 - 3/4)² where it is right, (1 - 1/4)² where it is wrong.
    """
    import math

    import torch

    from tasks.jobs.reward_model import calibration

    sure = math.log(3)
    fair = calibration(torch.tensor([sure, sure, sure, -sure]))
    assert fair["eval_ece"] == pytest.approx(0.0, abs=1e-6)
    assert fair["eval_brier"] == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    modest = calibration(torch.tensor([sure, sure, sure, sure]))
    assert modest["eval_ece"] == pytest.approx(0.25) and modest["eval_brier"] == pytest.approx(0.25**2)


def test_halt_at_a_step_that_saves_leaves_nothing_to_go_on_from(grpo_spec):
    """A run started again goes on from before the halt, and halts again: it cannot slip by it."""
    from tasks.jobs import grpo
    from tasks.jobs.checkpoints import last_saved
    from tasks.jobs.job import Halted

    job = grpo_spec(halting_late(), beta=0.0, max_steps=30, save_strategy="steps", save_steps=1)
    with pytest.raises(Halted) as first:
        grpo.main(job)
    step = first.value.details["finding"]["step"]
    assert last_saved(job.checkpoints).name == f"checkpoint-{step - 1}"
    with pytest.raises(Halted) as again:
        grpo.main(job)
    assert again.value.details["finding"] == first.value.details["finding"]


def test_rolled_back_policy_has_the_numbers_of_its_own_steps(grpo_spec):
    """The mean of the last five log lines up to the step that it is put back to."""
    from tasks.jobs import grpo

    job = grpo_spec(halting_late(on_halt="rollback"), beta=0.0, max_steps=30, save_strategy="steps", save_steps=1)
    result = grpo.main(job)
    own = [line["canary/kl"] for line in logged(job)][: result.details["rolled_back_to"]][-5:]
    assert result.metrics["canary/kl"] == pytest.approx(sum(own) / len(own))
    assert result.metrics["canary/kl"] <= 0.01


def test_loss_that_is_not_a_number_halts_any_training(spec, made):
    """SFT has no corridors; a learning rate of 1e30 is seen at its first log line that is not finite."""
    from tiny_recipe import LORA

    from tasks.jobs import sft
    from tasks.jobs.job import Halted

    args = TRAIN | {"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 6}
    with pytest.raises(Halted, match="has diverged"):
        sft.main(spec("sft", "sft", lora=LORA, args=args))
