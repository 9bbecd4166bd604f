"""The evaluation, really run on tiny models: every model is asked the same, and each score is what it says."""

import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_recipe import LORA, TRAIN

from tasks.job_spec import JobSpec
from tasks.jobs import without_vllm  # noqa: F401  (before any trainer is imported)

pytestmark = pytest.mark.job
PROJECT = Path(__file__).resolve().parents[2]
CONFIG = {
    "metric": "accuracy", "scorer": "exact_answer", "rewards": [], "win_rate": False, "max_new_tokens": 8, "max_length": 64,
    "batch_size": 10, "tasks": [], "num_fewshot": None, "limit": None,
    "backend": "transformers",
}  # fmt: skip
NAMES = ("base_model", "sft", "policy", "merge", "rows", "reward_model", "champion")
CANARIES = {"num_prompts": 8, "max_new_tokens": 8, "batch_size": 8}


def job(folder: Path, inputs: dict[str, str], **config) -> JobSpec:
    """Make the JobSpec of an evaluation in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output").mkdir()
    config = {"dtype": "float32", "base_digest": "tiny"} | CONFIG | config
    return JobSpec(
        stage="evaluate", module="tasks.jobs.evaluate", seed=1, inputs=inputs, config=config, output=folder / "output",
        work=folder, checkpoints=folder / "checkpoints",
    )  # fmt: skip


def samples(spec: JobSpec) -> list[dict]:
    return [json.loads(line) for line in (spec.output / "samples.jsonl").open()]


def scores(spec: JobSpec, metric: str) -> dict[str, list[float]]:
    """Return each model's scores in the order of rows, after a look at the rows being 0, 1, 2, …"""
    found: dict[str, list[float]] = {}
    for line in samples(spec):
        if line["metric"] == metric:
            assert line["row"] == len(found.setdefault(line["model"], []))
            found[line["model"]].append(line["score"])
    return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The task folder that docs/evaluation.md shows, with 24 rows of data."""
    folder = tmp_path_factory.mktemp("tasks") / "digits"
    folder.mkdir()
    for text in re.findall(r"^```yaml\n(task: .*?)^```", (PROJECT / "docs" / "evaluation.md").read_text(), re.M | re.S):
        (folder / f"{text.split()[1]}.yaml").write_text(text)
    rng = random.Random(0)
    lists = ["".join(rng.choices("0123456789", k=rng.randint(4, 7))) for _ in range(24)]
    rows = [{"digits": digits, "smallest": int(min(digits))} for digits in lists]
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def schooled(tmp_path_factory) -> SimpleNamespace:
    """A base that can copy digits, an SFT adapter that learned to sort them and forgot how to copy, and who judges them.

    The policy is half of the SFT adapter; the champion the SFT adapter merged into the base, so it must answer as SFT does.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from tasks.jobs import merge, sft
    from tasks.jobs.make_quickstart import make

    root = tmp_path_factory.mktemp("schooled")
    make(root, 1, {"num_sft": 128, "num_preference": 24, "num_prompts": 1, "num_eval": 24, "pretrain_steps": 200})
    for path in root.glob("*.jsonl"):
        (root / path.stem).mkdir()
        table = pa.Table.from_pylist([json.loads(line) for line in path.open()])
        pq.write_table(table, root / path.stem / "rows.parquet")
    base = {"base_model": str(root / "base_model")}
    learn = job(
        root / "learn", base | {"rows": str(root / "sft")}, lora=LORA, args=TRAIN | {"learning_rate": 1e-2, "max_steps": 6}
    )
    sft.main(learn.model_copy(update={"stage": "sft"}))
    policy = halved(learn.output, root / "policy")
    released, merged = (
        job(root / "released", base | {"policy": str(learn.output)}),
        job(root / "merged", base | {"policy": policy}),
    )
    for made in (released, merged):
        merge.main(made.model_copy(update={"stage": "merge"}))
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(base["base_model"], num_labels=1)
    judge.save_pretrained(root / "reward_model")
    AutoTokenizer.from_pretrained(base["base_model"]).save_pretrained(root / "reward_model")
    return SimpleNamespace(
        rows=str(root / "eval"), pairs=str(root / "preference"), reward_model=str(root / "reward_model"), sft=str(learn.output),
        policy=policy, merge=str(merged.output), champion=str(released.output), **base,
    )  # fmt: skip


def halved(adapter: Path, folder: Path) -> str:
    """Copy an adapter with half the change that it makes to the weights."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file({n: t / 2 if "lora_B" in n else t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def whole(schooled, digits, tmp_path_factory) -> tuple[JobSpec, object]:
    """One evaluation with everything that it can be asked for, and its result."""
    from tasks.jobs import evaluate

    inputs = {name: getattr(schooled, name) for name in NAMES}
    spec = job(
        tmp_path_factory.mktemp("whole"), inputs | {"task_folder": str(digits)}, rewards=["near_answer"], win_rate=True,
        tasks=["smallest_digit", "copy_digits"], canaries=CANARIES,
    )  # fmt: skip
    return spec, evaluate.main(spec)


def test_evaluate_scores_every_model_on_every_row_of_every_metric(whole):
    spec, result = whole
    for metric in ("accuracy", "reward/near_answer", "smallest_digit/acc", "copy_digits/exact_match"):
        by_model = scores(spec, metric)
        assert {name: len(own) for name, own in by_model.items()} == dict.fromkeys(("base", "sft", "policy", "champion"), 24)
        for name, own in by_model.items():
            assert result.metrics[f"{metric}/{name}"] == pytest.approx(sum(own) / 24)
    completions = {(line["model"], line["row"]): line for line in samples(spec) if line["metric"] == "accuracy"}
    assert all(line["score"] == (line["completion"] == line["answer"]) for line in completions.values())
    for line in samples(spec):
        if line["metric"] == "reward/near_answer":
            assert line["response"] == completions[line["model"], line["row"]]["completion"]


def test_evaluate_of_the_merged_champion_answers_as_the_adapter_it_was_merged_from_and_as_no_other(whole):
    spec, result = whole
    said = {
        name: [line["completion"] for line in samples(spec) if line["metric"] == "accuracy" and line["model"] == name]
        for name in ("base", "sft", "policy", "champion")
    }
    assert said["champion"] == said["sft"]
    assert len({tuple(said[name]) for name in ("base", "sft", "policy")}) == 3
    assert result.metrics["canary/kl_to_champion"] > 0.01
    for metric in ("smallest_digit/acc", "copy_digits/exact_match", "smallest_digit/mcc"):
        assert result.metrics[f"{metric}/champion"] == result.metrics[f"{metric}/sft"]


def test_evaluate_shows_what_an_adapter_forgot_though_its_accuracy_rose(whole):
    metrics = whole[1].metrics
    assert metrics["copy_digits/exact_match/base"] - metrics["copy_digits/exact_match/sft"] > 0.3
    assert metrics["reward/near_answer/sft"] > metrics["reward/near_answer/base"]


def test_lm_eval_scores_follow_from_what_the_model_said(whole):
    spec, _ = whole
    written = [line for line in samples(spec) if line["metric"] == "copy_digits/exact_match"]
    assert all(line["score"] == (line["response"] == line["target"]) for line in written)
    assert {0.0, 1.0} == {line["score"] for line in written}


def test_lm_eval_metric_of_all_rows_at_once_is_a_metric_without_rows(whole):
    spec, result = whole
    assert {f"smallest_digit/mcc/{name}" for name in ("base", "sft", "policy", "champion")} <= set(result.metrics)
    assert scores(spec, "smallest_digit/mcc") == {}


def test_evaluate_says_of_each_model_how_it_was_asked(whole):
    comparable = whole[1].details["comparable"]
    assert set(comparable) == {"base", "sft", "policy", "champion"}
    assert all(own == comparable["base"] for own in comparable.values())
    assert set(comparable["base"]["tasks"]) == {"smallest_digit", "copy_digits"}


def test_win_rate_is_the_sign_of_the_reward_models_difference(whole, schooled):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec, result = whole
    judge = AutoModelForSequenceClassification.from_pretrained(schooled.reward_model)
    tokenizer = AutoTokenizer.from_pretrained(schooled.reward_model)
    asked = {(line["model"], line["row"]): line for line in samples(spec) if line["metric"] == "accuracy"}

    def reward(model: str, row: int) -> float:  # one at a time, without padding
        line = asked[model, row]
        chat = [*line["prompt"], {"role": "assistant", "content": line["completion"]}]
        return judge(**tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")).logits.item()

    lines = [line for line in samples(spec) if line["metric"] == "win_rate/sft"]
    assert [line["row"] for line in lines] == list(range(24)) and {line["model"] for line in lines} == {"policy"}
    for line in lines:
        ours, theirs = reward("policy", line["row"]), reward("sft", line["row"])
        assert (line["reward"], line["other_reward"]) == pytest.approx((ours, theirs), abs=1e-4)
        same = asked["policy", line["row"]]["completion"] == asked["sft", line["row"]]["completion"]
        assert line["score"] == (0.5 if same else float(ours > theirs))
    assert {0.0, 1.0} <= {line["score"] for line in lines}
    assert scores(spec, "win_rate/champion") == scores(spec, "win_rate/sft")
    assert 0 < result.metrics["win_rate_lc/sft/policy"] < 1


@pytest.fixture
def other_champion(schooled, tmp_path) -> Path:
    """The champion with the chat template of another project and one more token."""
    from transformers import AutoTokenizer

    folder = tmp_path / "other"
    shutil.copytree(schooled.champion, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "system")
    tokenizer.save_pretrained(folder)
    return folder


def test_champion_of_another_template_and_vocabulary_is_asked_in_its_own_and_said_to_be_another(
    schooled, digits, whole, other_champion, tmp_path, caplog
):
    from tasks.jobs import evaluate

    inputs = {name: getattr(schooled, name) for name in ("base_model", "policy", "merge", "rows")}
    inputs |= {"champion": str(other_champion), "task_folder": str(digits)}
    spec = job(tmp_path / "job", inputs, tasks=["copy_digits"], num_fewshot=1, canaries=CANARIES)
    result = evaluate.main(spec)
    comparable = result.details["comparable"]
    assert (
        comparable["champion"]["chat_template"] != comparable["policy"]["chat_template"] == comparable["base"]["chat_template"]
    )
    assert comparable["champion"]["tasks"] != comparable["policy"]["tasks"] == comparable["base"]["tasks"]
    assert "canary/kl_to_champion" not in result.metrics and "different vocabularies" in caplog.text
    without_example = whole[1].details["comparable"]["policy"]["tasks"]["copy_digits"]
    assert comparable["policy"]["tasks"]["copy_digits"] != without_example


@pytest.fixture
def penalised(schooled, tmp_path) -> str:
    """The base with a generation_config under which nothing can be copied: a digit that was said is not said again."""
    folder = tmp_path / "penalised"
    shutil.copytree(schooled.base_model, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 50.0}))
    return str(folder)


def test_lm_eval_decodes_greedily_whatever_the_bases_generation_config_says(schooled, digits, whole, penalised, tmp_path):
    """And `limit` takes the first rows; a number per row whose aggregate is no mean stays without rows."""
    from tasks.jobs import evaluate

    folder = tmp_path / "tasks"
    shutil.copytree(digits, folder)
    text = (folder / "copy_digits.yaml").read_text().replace("copy_digits", "copy_median")
    (folder / "copy_median.yaml").write_text(text.replace("aggregation: mean", "aggregation: median"))
    inputs = {"base_model": penalised, "policy": schooled.policy, "merge": schooled.merge, "rows": schooled.pairs}
    inputs |= {"task_folder": str(folder)}
    spec = job(tmp_path, inputs, metric="preference_accuracy", tasks=["copy_digits", "copy_median"], limit=12)
    result = evaluate.main(spec)
    unpenalised = scores(whole[0], "copy_digits/exact_match")
    assert scores(spec, "copy_digits/exact_match") == {name: unpenalised[name][:12] for name in ("base", "policy")}
    assert sum(unpenalised["base"][:12]) > 3
    assert "copy_median/exact_match/base" in result.metrics and scores(spec, "copy_median/exact_match") == {}


def test_vllm_answers_the_tasks_as_transformers_does_and_leaves_no_process(schooled, digits, whole, tmp_path):
    """The launcher's ranks are not vLLM's."""
    from tasks.jobs import evaluate

    inputs = {name: getattr(schooled, name) for name in ("base_model", "sft", "policy", "merge", "rows")}
    tasks = {"tasks": ["smallest_digit", "copy_digits"], "backend": "vllm"}
    spec = job(tmp_path, inputs | {"task_folder": str(digits)}, **tasks)
    with pytest.MonkeyPatch.context() as launcher:
        launcher.setenv("WORLD_SIZE", "2")
        launcher.setenv("RANK", "1")
        result = evaluate.main(spec)
        assert os.environ["WORLD_SIZE"] == "2"
    for metric in ("smallest_digit/acc", "copy_digits/exact_match"):
        by_transformers = scores(whole[0], metric)
        assert scores(spec, metric) == {name: by_transformers[name] for name in ("base", "sft", "policy")}
    assert result.details["comparable"]["sft"] == whole[1].details["comparable"]["sft"]
    assert len({result.metrics[f"copy_digits/exact_match/{name}"] for name in ("base", "sft", "policy")}) > 1
    alive = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    assert not [one for one in alive if "EngineCore" in " ".join(one.cmdline())]
    assert not (spec.work / "merged_sft").exists()


def test_kl_to_the_champion_is_0_where_the_policy_is_the_champion(schooled, tmp_path):
    from tasks.jobs import evaluate

    inputs = {name: getattr(schooled, name) for name in ("base_model", "rows", "champion")}
    inputs |= {"policy": schooled.sft, "merge": schooled.champion}
    result = evaluate.main(job(tmp_path, inputs, canaries=CANARIES))
    assert result.metrics["canary/kl_to_champion"] == pytest.approx(0.0, abs=1e-4)
    assert set(result.details["comparable"]) == {"base", "policy", "champion"}


def test_evaluate_of_pairs_prefers_what_is_likelier_and_lets_the_reward_model_judge_answers_to_them(schooled, tmp_path):
    from tasks.jobs import evaluate

    inputs = {name: getattr(schooled, name) for name in ("base_model", "sft", "policy", "merge", "reward_model")}
    spec = job(tmp_path, inputs | {"rows": schooled.pairs}, metric="preference_accuracy", win_rate=True)
    result = evaluate.main(spec)
    lines = [line for line in samples(spec) if line["metric"] == "preference_accuracy"]
    assert [(line["model"], line["row"]) for line in lines] == [(n, i) for n in ("base", "sft", "policy") for i in range(24)]
    assert all(line["score"] == (line["margin"] > 0) for line in lines)
    # what SFT demonstrates is mostly what the pairs prefer
    assert result.metrics["preference_accuracy/sft"] > result.metrics["preference_accuracy/base"]
    assert len(scores(spec, "win_rate/sft")["policy"]) == 24


def test_reward_function_that_reads_a_column_which_is_not_there_is_refused_before_any_model_is_loaded(schooled, tmp_path):
    from tasks.jobs import evaluate

    inputs = {"base_model": "nowhere", "policy": "nowhere", "rows": schooled.pairs}
    spec = job(tmp_path, inputs, metric="preference_accuracy", rewards=["near_answer"])
    with pytest.raises(ValueError, match="near_answer.*'answer'.*prompt, chosen, rejected"):
        evaluate.main(spec)


def test_unknown_task_is_told_with_near_names_and_what_could_not_be_read(digits, tmp_path):
    from tasks.jobs.check_args import check_tasks

    assert check_tasks(["copy_digits", "smallest_digit"], str(digits), []) == []
    folder = tmp_path / "folder"
    shutil.copytree(digits, folder)
    (folder / "broken.yaml").write_text("task: [")
    (problem,) = check_tasks(["hellaswag", "copy_digit"], str(folder), [])  # lm-eval's own is known, if not loaded
    assert re.search(r"'copy_digit'.*Did you mean copy_digits.*broken\.yaml there cannot be read", problem, re.S)


@pytest.mark.parametrize(
    ("tasks", "metric", "said"),
    [
        (["smallest_digit", "copy_digits"], "smallest_digit/acc", None),
        (["smallest_digit", "copy_digits"], "smallest_digit/accc", "measures smallest_digit/acc."),
        (["smallest_digit", "copy_digits"], "smallest_digit/mcc", "measures smallest_digit/acc."),
        (["smallest_digit", "copy_digits"], "copy_digit/exact_match", "copy_digits"),
        (["ai2_arc"], "arc_easy/acc_norm", None),
        (["ai2_arc"], "ai2_arc/acc", "arc_"),
        (["mmlu"], "mmlu/acc", "no single task"),
        (["mmlu"], "mmlu_virology/acc", None),
        (["gsm8k"], "gsm8k/exact_match:strict-match", None),
        (["gsm8k"], "gsm8k/exact_match", "exact_match:strict-match"),
        (["wikitext"], "wikitext/word_perplexity", "measures nothing"),
    ],
)
def test_gate_on_what_no_task_measures_row_by_row_is_refused_before_anything_trains(tasks, metric, said, digits):
    from tasks.jobs.check_args import check_tasks

    problems = check_tasks(tasks, str(digits), [metric])
    assert bool(problems) == bool(said) and (not said or said in problems[0])


@pytest.mark.parametrize("include", ["../common.yaml", "'../common.yaml'"])
def test_task_that_includes_what_its_folders_digest_does_not_cover_is_refused(include, digits, tmp_path):
    from tasks.jobs import harness

    folder = tmp_path / "folder"
    shutil.copytree(digits, folder)
    (tmp_path / "common.yaml").write_text("output_type: generate_until\n")
    (folder / "copy_digits.yaml").write_text(f"include: {include}\n" + (folder / "copy_digits.yaml").read_text())
    with pytest.raises(ValueError, match="outside recipe.evaluate.task_folder"):
        harness.load_tasks(["copy_digits"], folder, tmp_path / "cache")
    shutil.move(tmp_path / "common.yaml", folder / "common.yaml")
    (folder / "copy_digits.yaml").write_text((folder / "copy_digits.yaml").read_text().replace("../", ""))
    assert "copy_digits" in harness.load_tasks(["copy_digits"], folder, tmp_path / "cache").leaves


def test_policy_and_champion_are_asked_in_the_dtype_that_they_were_merged_in(schooled, tmp_path):
    from tasks.jobs.evaluate import load_speakers

    inputs = {name: getattr(schooled, name) for name in ("base_model", "policy", "merge", "rows", "champion")}
    by_name = {one.name: one.model for one in load_speakers(job(tmp_path, inputs, dtype="bfloat16"))}
    dtypes = {name: model.dtype for name, model in by_name.items()}
    assert dtypes == {"base": torch.bfloat16, "policy": torch.float32, "champion": torch.float32}


@pytest.mark.parametrize("where", ["../outside.jsonl", ".hidden.jsonl"])
def test_task_that_reads_what_its_folders_digest_does_not_cover_is_refused(digits, tmp_path, where):
    from tasks.jobs import harness

    folder = tmp_path / "folder"
    shutil.copytree(digits, folder)
    shutil.copy(folder / "digits.jsonl", folder / where)
    text = (folder / "copy_digits.yaml").read_text()
    (folder / "copy_digits.yaml").write_text(text.replace("digits.jsonl", where))
    with pytest.raises(ValueError, match=re.escape(where)):
        harness.load_tasks(["copy_digits"], folder, tmp_path / "cache")


def test_task_that_aggregates_by_an_unknown_name_is_refused_before_any_model_is_loaded(schooled, digits, tmp_path):
    from tasks.jobs import evaluate

    folder = tmp_path / "folder"
    shutil.copytree(digits, folder)
    text = (folder / "smallest_digit.yaml").read_text()
    (folder / "smallest_digit.yaml").write_text(text.replace("aggregation: matthews_corrcoef", "aggregation: mcc"))
    inputs = {"base_model": "nowhere", "policy": "nowhere", "rows": schooled.rows, "task_folder": str(folder)}
    with pytest.raises(ValueError, match="'smallest_digit' aggregates 'mcc'"):
        evaluate.main(job(tmp_path / "job", inputs, tasks=["smallest_digit"]))


def test_task_data_is_found_beside_its_yaml_and_cached_under_the_jobs_own_folder(digits, tmp_path, monkeypatch):
    from tasks.fingerprints import tree_digest
    from tasks.jobs import harness

    folder = tmp_path / "tasks" / "deeper"
    shutil.copytree(digits, folder)
    text = (folder / "copy_digits.yaml").read_text()
    (folder / "copy_digits.yaml").write_text(text.replace('"Copy: {{digits}}"', "!function asking.copy"))
    (folder / "asking.py").write_text("def copy(doc):\n    return f'Copy: {doc}'\n")
    before = tree_digest(tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    tasks = harness.load_tasks(["copy_digits"], Path("tasks"), tmp_path / "cache")
    assert len(tasks.leaves["copy_digits"].eval_docs) == 24
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert tree_digest(tmp_path / "tasks") == before


def test_length_controlled_win_rate_is_the_saturated_models_intercept():
    """Two lengths, x = ±a, make the regression saturated: its logits are those of the two shares.

    With std = a, logit p(+) = θ + φ tanh 1 and logit p(−) = θ − φ tanh 1. Of 20 longer answers 18 win (logit ln 9), of 20
    shorter ones 10 (logit 0): θ = ln 9 / 2 = ln 3, a win rate of 3/4 at equal length, where the plain one is 0.7.
    """
    from tasks.jobs.win_rate import length_controlled

    outcomes = [1.0] * 18 + [0.0] * 2 + [1.0] * 10 + [0.0] * 10
    assert length_controlled(outcomes, [30] * 20 + [-30] * 20) == pytest.approx(0.75, abs=1e-3)
    # the mirror image: the other's rate is what is left
    assert length_controlled([1 - o for o in outcomes], [-30] * 20 + [30] * 20) == pytest.approx(0.25, abs=1e-3)


def test_length_controlled_win_rate_without_a_length_difference_is_the_plain_one():
    from tasks.jobs.win_rate import length_controlled

    assert length_controlled([1.0, 0.5, 0.0, 0.5, 1.0], [0] * 5) == pytest.approx(0.6, abs=1e-6)
    assert length_controlled([1.0] * 5, [1, 2, 3, 4, 5]) == 1.0


def test_length_controlled_win_rate_is_one_half_where_the_longer_answer_always_wins():
    """Length alone explains it: the two sides' logits are equal and opposite, so the intercept is 0 however large they are."""
    from tasks.jobs.win_rate import length_controlled

    rate = length_controlled([1.0] * 12 + [0.0] * 12, [10] * 12 + [-10] * 12)
    assert math.isfinite(rate) and rate == pytest.approx(0.5, abs=1e-3)
