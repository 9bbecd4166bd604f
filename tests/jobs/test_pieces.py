"""The pieces of the job side that need no training: rewards, the argument check, the template, the makers."""

import json
import subprocess
import sys

import pytest

from profiles.load import load, shipped
from tasks.jobs import without_vllm  # noqa: F401

pytestmark = pytest.mark.job


@pytest.mark.parametrize(
    ("text", "right"),
    [("7", 1), ("The answer is 7.", 1), ("3 + 4 = 7", 1), ("7 apples", 0), ("1,007", 0), ("it is 8", 0), ("", 0), ("-7", 0)],
)
def test_number_answer_counts_only_a_number_at_the_end(text, right):
    from tasks.jobs.rewards import number_answer

    assert number_answer([text], ["7"]) == [right]
    assert number_answer([[{"role": "assistant", "content": text}]], ["7"]) == [right]


def test_near_answer_gives_half_the_share_of_characters_in_place_and_1_only_for_the_answer():
    from tasks.jobs.rewards import near_answer

    # "1378" against "1379": 3 of 4 in place -> 0.5 * 3 / 4; too long "13790": 4 of 5 -> 0.5 * 4 / 5
    assert near_answer(["1379", "1378", "13790", ""], ["1379"] * 4) == [1.0, 0.375, 0.4, 0.0]


def test_math_answer_takes_equal_values_in_other_forms():
    from tasks.jobs.rewards import math_answer

    assert math_answer([r"so it is \boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"], ["$0.5$", "$0.5$"]) == [1.0, 0.0]


def ask(question: dict) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tasks.jobs.check_args"], input=json.dumps(question), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_check_args_names_the_neighbour_of_a_typo_the_refused_value_and_the_missing_reward():
    answer = ask(
        {
            "args": {
                "recipe.sft": ["SFTConfig", {"lerning_rate": 1e-4}],
                "recipe.policy": ["GRPOConfig", {"num_generations": 7, "per_device_train_batch_size": 8}],
                "recipe.reward_model": ["RewardConfig", {"learning_rate": "1e-4x"}],
            },
            "rewards": ["exact_answer", "trl.accuracy_reward", "reward_model", "exact_anwser"],
        }
    )
    problems, columns = answer["problems"], answer["columns"]
    assert len(problems) == 4 and columns == {"exact_answer": ["answer"], "trl.accuracy_reward": ["solution"]}
    text = "\n".join(problems)
    assert "recipe.sft.args.lerning_rate" in text and "learning_rate" in text
    assert "recipe.policy.args is refused" in text and "7" in text
    assert "recipe.reward_model.args.learning_rate" in text
    assert "exact_anwser" in text and "exact_answer" in text


def test_check_args_has_nothing_to_say_about_good_ones():
    assert ask({"args": {"recipe.sft": ["SFTConfig", {"learning_rate": 1e-4}]}, "rewards": ["number_answer"]})["problems"] == []


def test_quickstart_template_prompt_ids_are_a_prefix_of_prompt_and_completion(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "base_model")
    row = json.loads((made / "sft.jsonl").open().readline())
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    assert whole[: len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id


def test_quickstart_maker_same_seed_same_bytes_other_seed_other_rows(tmp_path):
    from tasks.fingerprints import tree_digest
    from tasks.jobs.make_quickstart import make

    small = {"num_sft": 16, "num_preference": 16, "num_prompts": 16, "num_eval": 16, "pretrain_steps": 3}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, seed, small)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b") != tree_digest(tmp_path / "c")


def test_quickstart_maker_holds_out_prompts_that_no_training_row_asks_in_any_order(made):
    def lists(name: str) -> set[str]:
        rows = [json.loads(line) for line in (made / f"{name}.jsonl").open()]
        return {"".join(sorted(row["prompt"][0]["content"].split()[1])) for row in rows}

    assert not lists("eval") & (lists("sft") | lists("preference") | lists("prompts"))


def test_choose_rollouts_falls_back_for_a_head_vllm_refuses_and_refuses_where_vllm_was_asked_for(spec, tmp_path):
    from tasks.jobs.grpo import choose_rollouts

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8}))
    job = spec("grpo", None, {"base_model": str(tmp_path)}, rollouts="auto")
    assert choose_rollouts(job)[0] == "transformers"
    with pytest.raises(RuntimeError, match="head_dim 8"):
        choose_rollouts(job.model_copy(update={"config": {"rollouts": "vllm", "base_digest": "tiny"}}))


@pytest.mark.parametrize("name", shipped())
def test_shipped_profile_arguments_are_taken_by_trl(name):
    from tasks.check_profile import question
    from tasks.jobs.check_args import check_args, check_reward

    asked = question(load(name))
    problems = [p for where, (config_class, args) in asked["args"].items() for p in check_args(where, config_class, args)]
    assert problems + [p for reward in asked["rewards"] if (p := check_reward(reward))] == []
