"""The `posttrain` command: each wrong input is one clear error with its exit code, no traceback, and nothing left behind."""

import json
import os
import socket
from pathlib import Path

import pytest
import typer

from flows.cli import app

COMMANDS = sorted(typer.main.get_command(app).commands)
PAIRS = [{"prompt": f"Say {n}", "chosen": f" {n}.", "rejected": " No, I will not."} for n in range(8)]


def assert_refused(done, exit_code: int, *named: str) -> None:
    """One error, which names what it is about and is no traceback."""
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    text = " ".join(done.stderr.split())
    assert [name for name in named if name not in text] == [], done.stderr


def runs_in(home: Path) -> list[str]:
    """Return what a run would have left: folders that are not the servers' own."""
    return [path.name for path in home.iterdir() if not path.name.startswith(".")] if home.exists() else []


@pytest.fixture
def rows_file(tmp_path):
    def write(rows: list | str, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_commands_are_those_that_were_promised():
    assert {"run", "plan", "validate", "ui", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_asked_for_help_explains_itself(command, posttrain):
    done = posttrain(command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["quikstart"], ["'quikstart'", "quickstart"]),
        (["gone.yaml"], ["gone.yaml"]),
        (["quickstart", "--set", "recipe.polcy.lora.r=8"], ["recipe.polcy", "policy"]),
        (["quickstart", "--set", "recipe.seed"], ["recipe.seed", "="]),
        (["quickstart", "--set", "recipe.seed=many"], ["recipe.seed", "many"]),
        (
            ["quickstart", "--set", "recipe.policy.args.beta=0.0", "--set", "drift.canaries.num_prompts=0"],
            ["drift.canaries.num_prompts", "beta 0.0", "drift.signals.kl"],
        ),
        (["quickstart", "--set", "recipe.reward_model=null"], ["recipe.policy.reward_functions", "recipe.reward_model"]),
        (["quickstart", "--set", "placement.policy.accelerate=ddp_9"], ["ddp_9", "ddp_8"]),
    ],
    ids=["missing profile", "missing file", "unknown key", "no value", "wrong type", "drift", "reward", "accelerate"],
)
def test_run_of_a_profile_that_is_wrong_is_refused_before_anything_starts(arguments, named, posttrain, home):
    assert_refused(posttrain("run", *arguments), 2, *named)
    assert runs_in(home) == []


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_command_on_a_misspelt_profile_is_refused_with_its_neighbour(command, posttrain):
    assert_refused(posttrain(command, "quikstart"), 2, "'quikstart'", "quickstart")


def test_profile_with_broken_yaml_is_refused_by_its_path_and_line(posttrain, tmp_path):
    (tmp_path / "own.yaml").write_text("description: x\nrecipe: [unclosed\n")
    assert_refused(posttrain("plan", "own.yaml"), 2, "own.yaml", "line")


def test_plan_of_a_profile_never_run_lists_every_stage_and_builds_nothing(posttrain, home, job_python):
    done = posttrain("plan", "quickstart", POSTTRAIN_JOB_PYTHON=job_python())
    assert done.returncode == 0, done.stderr
    listed = [line.split()[:2] for line in done.stdout.splitlines()[1:] if line.strip()]
    stages = ["prepare", "validate-eval", "validate-sft", "validate-preference", "validate-prompts"]
    stages += ["sft", "reward_model", "grpo", "merge", "evaluate", "export"]
    assert listed == [[stage, "run"] for stage in stages]
    assert runs_in(home) == []


def test_plan_with_arguments_that_trl_refuses_is_refused_with_each(posttrain, job_python):
    problems = "recipe.sft.args.learning_rat is no argument of SFTConfig", "there is no reward function near"
    done = posttrain("plan", "quickstart", POSTTRAIN_JOB_PYTHON=job_python(*problems))
    assert_refused(done, 2, "recipe.sft.args.learning_rat", "near")


def test_plan_without_a_job_environment_is_refused_with_the_way_out(posttrain, tmp_path):
    done = posttrain("plan", "quickstart", POSTTRAIN_JOB_PYTHON=str(tmp_path / "nowhere"))
    assert_refused(done, 4, "nowhere", "make install")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_home_that_cannot_be_written_is_refused_with_the_way_out(command, posttrain, job_python, tmp_path):
    (tmp_path / "file").write_text("in the way")
    place = str(tmp_path / "file" / "home")
    done = posttrain(command, "quickstart", POSTTRAIN_JOB_PYTHON=job_python(), POSTTRAIN_HOME=place, PREFECT_HOME=place)
    assert_refused(done, 4, place, "POSTTRAIN_HOME")


@pytest.mark.parametrize("value", [".nan", ".inf", "2026-11-22"])
def test_plan_with_a_value_that_has_no_canonical_form_is_refused_by_its_setting(value, posttrain, job_python):
    override = f"recipe.sft.args.learning_rate={value}"
    done = posttrain("plan", "quickstart", "--set", override, POSTTRAIN_JOB_PYTHON=job_python())
    assert_refused(done, 2, "recipe.sft.args.learning_rate")


# --- validate ---------------------------------------------------------------------------------------------------------------


def test_validate_of_good_rows_passes_and_writes_nothing(posttrain, rows_file, home, tmp_path):
    path = rows_file(PAIRS)
    done = posttrain("validate", "--kind", "preference", "--data", path)
    assert done.returncode == 0, done.stderr
    assert "preference" in done.stderr + done.stdout and "accepted" in done.stderr + done.stdout
    assert runs_in(home) == [] and sorted(p.name for p in tmp_path.iterdir() if p != home) == [path.name]


def test_validate_of_rows_that_break_their_contract_names_rule_and_row(posttrain, rows_file):
    """Row 5 is a tie: its two replies are one."""
    broken = [row | {"rejected": row["chosen"]} if n == 4 else row for n, row in enumerate(PAIRS)]
    done = posttrain("validate", "--kind", "preference", "--data", rows_file(broken))
    assert_refused(done, 3, "ContractBroken", "rows.jsonl", "preference-tie", "1 of 8", "5")


@pytest.mark.parametrize(
    ("row", "named"),
    [({"prompt": "Say 3", "chosen": " 3."}, "rejected"), ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt")],
    ids=["column missing", "wrong type"],
)
def test_validate_of_a_row_of_another_form_names_its_line(row, named, posttrain, rows_file):
    rows = [*PAIRS[:3], row, *PAIRS[4:]]
    assert_refused(posttrain("validate", "--kind", "preference", "--data", rows_file(rows)), 3, "line 4", named)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.jsonl", "", "empty"),
        ("rows.json", "[]", "empty"),
        ("rows.jsonl", '{"prompt": "cut', "line 1"),
        ("rows.csv", "prompt,chosen\n", ".csv"),
        ("rows.parquet", "no parquet", "rows.parquet"),
    ],
    ids=["empty", "empty array", "cut", "other format", "no parquet"],
)
def test_validate_of_a_file_that_cannot_be_read_is_refused_by_it(name, content, named, posttrain, rows_file):
    assert_refused(posttrain("validate", "--kind", "preference", "--data", rows_file(content, name)), 3, name, named)


def test_validate_of_a_missing_file_is_refused_by_its_name(posttrain):
    assert_refused(posttrain("validate", "--kind", "preference", "--data", "gone.jsonl"), 2, "--data", "gone.jsonl")


def test_validate_of_a_wrong_kind_is_refused_with_those_there_are(posttrain, rows_file):
    done = posttrain("validate", "--kind", "preferences", "--data", rows_file(PAIRS))
    assert_refused(done, 2, "--kind", "'preferences'", "prompt_completion", "language_modeling")


def test_validate_of_a_wrong_layout_is_refused_with_those_there_are(posttrain, rows_file):
    done = posttrain("validate", "--kind", "preference", "--data", rows_file(PAIRS), "--layout", "sharegtp")
    assert_refused(done, 2, "sharegtp", "sharegpt")


@pytest.mark.parametrize(
    "arguments", [[], ["quickstart", "--kind", "eval", "--data", "x"], ["--data", "x"], ["--kind", "eval"]]
)
def test_validate_of_neither_or_both_is_refused_with_what_to_give(arguments, posttrain):
    assert_refused(posttrain("validate", *arguments), 2, "--kind", "--data")


def test_validate_of_a_profile_whose_rows_are_made_in_the_run_says_so(posttrain, job_python):
    done = posttrain("validate", "quickstart", POSTTRAIN_JOB_PYTHON=job_python())
    assert_refused(done, 2, "posttrain run quickstart")


# --- validate with a model --------------------------------------------------------------------------------------------------

TURN = "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}"
CHATML = TURN + "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
SPOKEN = [
    {"prompt": [{"role": "user", "content": "Say it"}], "completion": [{"role": "assistant", "content": "it " * (n + 1)}]}
    for n in range(8)
]


@pytest.fixture
def tokenizer(tmp_path):
    """Return a function that makes a folder with a tokenizer of a few words and this chat template."""

    def make(template: str = CHATML) -> Path:
        special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
        vocabulary = [*special, "<|unk|>", "user", "assistant", "Say", "it", "A", "B"]
        added = [{"id": n, "content": token, "special": True} for n, token in enumerate(special)]
        rest = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        model = {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(vocabulary)}, "unk_token": "<|unk|>"}
        made = {"version": "1.0", "added_tokens": [token | rest for token in added], "model": model}
        made |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None, "normalizer": None, "post_processor": None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(made | {"truncation": None, "padding": None}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        return folder

    return make


def test_validate_with_a_model_reads_the_rows_with_its_template_once(posttrain, rows_file, tokenizer, home):
    command = ["validate", "--kind", "prompt_completion", "--data", rows_file(SPOKEN), "--model", tokenizer()]
    for _ in range(2):
        done = posttrain(*command)
        assert done.returncode == 0, done.stderr
    assert len(list((home / ".token_facts").glob("*.parquet"))) == 1


def test_validate_with_a_model_names_the_rows_that_its_trainer_would_leave_out_or_cut(posttrain, rows_file, tokenizer):
    """The prompt is 4 tokens and what opens the reply 2, so 6 leave nothing; of 9, row 1 needs all, and each row one more."""
    command = ["validate", "--kind", "prompt_completion", "--data", rows_file(SPOKEN), "--model", tokenizer()]
    nothing = posttrain(*command, "--set", "args.max_length=7")
    assert_refused(nothing, 3, "sft-dropped: 8 of 8 rows")
    cut = posttrain(*command, "--set", "args.max_length=10", "--set", "contract.truncated_ratio_max=0")
    assert_refused(cut, 3, "sft-truncated")


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (CHATML.replace(" <|im_end|>", ""), "sft-end-of-reply"),
        ("{{ raise_exception('no') }}", "sft-renders"),
        (CHATML.replace("m.content", "'it'"), "sft-template-keeps-text"),
    ],
    ids=["no end", "raises", "rewrites"],
)
def test_validate_with_a_template_that_does_not_suit_is_refused_with_what_follows(
    template, rule, posttrain, rows_file, tokenizer
):
    done = posttrain("validate", "--kind", "prompt_completion", "--data", rows_file(SPOKEN), "--model", tokenizer(template))
    assert_refused(done, 3, rule)


def test_validate_of_words_that_the_tokenizer_does_not_know_is_refused(posttrain, rows_file, tokenizer):
    row = {"prompt": [{"role": "user", "content": "Say что"}], "completion": [{"role": "assistant", "content": "it"}]}
    done = posttrain("validate", "--kind", "prompt_completion", "--data", rows_file([row]), "--model", tokenizer())
    assert_refused(done, 3, "sft-tokenizer-keeps-text", "lines 1")


@pytest.mark.parametrize(
    ("kind", "more", "named"),
    [
        ("stepwise_supervision", [], "stepwise_supervision"),
        ("prompt_completion", ["--set", "recipe.seed=2"], "args.NAME"),
        ("prompt_completion", ["--columns", "prompt"], "--columns"),
    ],
)
def test_validate_with_a_model_and_what_cannot_be_is_refused(kind, more, named, posttrain, rows_file, tokenizer):
    done = posttrain("validate", "--kind", kind, "--data", rows_file(SPOKEN), "--model", tokenizer(), *more)
    assert_refused(done, 2, named)


def test_validate_with_columns_reads_rows_by_their_own_names(posttrain, rows_file):
    path = rows_file([{"question": f"Say {n}", "solution": f"{n}.", "source": "web"} for n in range(8)])
    refused = posttrain("validate", "--kind", "prompt_completion", "--data", path)
    assert_refused(refused, 3, "question", "solution", "columns")
    named = ["--columns", "prompt=question,completion=solution"]
    assert posttrain("validate", "--kind", "prompt_completion", "--data", path, *named).returncode == 0


# --- ui and doctor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port"])
def test_ui_with_a_port_that_is_taken_is_refused_by_its_option(option, posttrain):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            free = str(other.getsockname()[1])
        port = str(taken.getsockname()[1])
        ports = {"--prefect-port": free, "--mlflow-port": free} | {option: port}
        done = posttrain("ui", *(part for item in ports.items() for part in item))
    assert_refused(done, 4, option, port)


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_ui_with_a_port_that_cannot_be_is_refused_by_its_option(port, posttrain):
    done = posttrain("ui", "--prefect-port", port)
    assert done.returncode in (2, 4)
    assert_refused(done, done.returncode, "--prefect-port", port)


def test_doctor_prints_a_line_for_each_check_and_exits_by_them(posttrain):
    done = posttrain("doctor")
    marks = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("ok", "todo"))]
    assert len(marks) >= 6
    assert done.returncode == (1 if "todo" in marks else 0)


def test_doctor_without_a_job_environment_and_server_says_what_to_do(posttrain, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        server = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = posttrain("doctor", POSTTRAIN_JOB_PYTHON=str(tmp_path / "nowhere"), PREFECT_API_URL=f"{server}/api")
    assert done.returncode == 1
    todo = done.stdout.split("todo", 1)[1]
    assert "make install" in todo and "PREFECT_API_URL" in todo and server in todo


def test_doctor_in_an_environment_with_another_version_names_it(posttrain, tmp_path):
    """The job environment that is asked has one package, of a version that nobody pinned."""
    python = tmp_path / "job" / "bin" / "python"
    folder = tmp_path / "job" / "lib" / "python3.11" / "site-packages" / "accelerate-0.0.1.dist-info"
    for path in (python, folder / "METADATA"):
        path.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 0.0.1\n")
    done = posttrain("doctor", POSTTRAIN_JOB_PYTHON=str(python))
    assert done.returncode == 1
    assert "accelerate 0.0.1" in done.stdout and "absent" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_doctor_with_a_home_that_cannot_be_written_says_so(posttrain, tmp_path):
    place = tmp_path / "sealed"
    place.mkdir(mode=0o500)
    done = posttrain("doctor", POSTTRAIN_HOME=str(place / "home"))
    assert done.returncode == 1 and "POSTTRAIN_HOME" in done.stdout
