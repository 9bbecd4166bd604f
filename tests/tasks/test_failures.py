"""What a job died of is told from what its ranks left, and decides whether it is tried again."""

import json
from pathlib import Path

import httpx
import pytest

from profiles.schema import StagePlacement
from tasks.attempts import cause_of, smaller_batches
from tasks.errors import ContractBroken, DriftHalted, GateFailed, JobFailed, MachineUnfit, ProfileError, RunCancelled
from tasks.failures import classify, diagnose, forget

# real texts of real libraries, as a rank's failure file has them
TEXTS = [
    (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
        "out of memory",
    ),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory", "out of memory"),
    ("MemoryError: ", "out of memory"),
    ("Interrupted: told to end by SIGTERM; it saved a checkpoint", "preempted"),
    ("SystemExit: 143", "preempted"),
    ("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error", "collective"),
    ("RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer", "collective"),
    ("ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded", "hiccup"),
    ("ReadTimeout: The read operation timed out", "hiccup"),
    ("ValueError: Unknown reward function 'x'", "bug"),
    ("RuntimeError: training changed no tensor: learning_rate may be 0", "bug"),
    ("KeyError: 'SystemExit'", "bug"),
]


@pytest.mark.parametrize(("text", "cause"), TEXTS, ids=[text[:30] for text, _ in TEXTS])
def test_error_has_the_class_that_says_whether_another_attempt_can_mend_it(text, cause):
    assert classify(text) == cause


@pytest.fixture
def left(tmp_path: Path):
    """A function that leaves what the ranks of a job leave; return the class and the text that follow."""
    (tmp_path / "log.txt").write_text("loading\nstep 1\nthe last line\n")

    def leave(started: int, **failures: str) -> tuple[str, str]:
        for rank in range(started):
            (tmp_path / f"rank{rank}.pid").write_text("1")
        for rank, error in failures.items():
            result = {"status": "failed", "error": error, "rank": int(rank[1:])}
            (tmp_path / f"failure.rank{rank[1:]}.json").write_text(json.dumps(result))
        return diagnose(tmp_path, tmp_path / "log.txt")

    return leave


def test_rank_without_a_word_was_killed_and_is_named(left):
    cause, text = left(2, r0="DistBackendError: NCCL error: remote process exited or there was a network error")
    assert cause == "died" and "rank 1 " in text and "the last line" in text


def test_error_of_its_own_is_the_cause_though_another_rank_was_killed_with_it(left):
    cause, text = left(2, r0="OutOfMemoryError: CUDA out of memory")
    assert cause == "out of memory" and "rank 0: OutOfMemoryError" in text


def test_job_that_never_started_is_no_reason_to_try_again(left):
    cause, text = left(0)
    assert cause == "bug" and "the last line" in text


def test_what_an_earlier_attempt_left_is_forgotten(left, tmp_path):
    left(1, r0="MemoryError: ")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    forget(tmp_path)
    assert diagnose(tmp_path, tmp_path / "log.txt")[0] == "bug"
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "metrics.jsonl"}


@pytest.mark.parametrize(
    "error",
    [
        ContractBroken("x"),
        DriftHalted("x"),
        GateFailed("x"),
        ProfileError("x"),
        RunCancelled("x"),
        MachineUnfit("x"),
        KeyError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_deliberate_stops_and_bugs_are_never_tried_again(error):
    assert cause_of(error) == "bug"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (JobFailed("x", "died"), "died"),
        (MachineUnfit("the store does not answer", "hiccup"), "hiccup"),
        (httpx.ConnectError("refused"), "hiccup"),
        (ConnectionResetError(), "hiccup"),
    ],
)
def test_failures_around_the_job_have_a_class_too(error, cause):
    assert cause_of(error) == cause


@pytest.mark.parametrize(
    ("args", "times", "batch", "accumulation"),
    [
        ({"per_device_train_batch_size": 16}, 1, 8, 2),
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3}, 2, 4, 12),
        ({"per_device_train_batch_size": 6}, 2, 1, 6),
        ({"per_device_train_batch_size": 1}, 3, 1, 1),
        ({}, 1, 4, 2),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 2}, 1, 4, 2),
    ],
)
def test_after_running_out_of_memory_the_batch_is_smaller_and_the_global_batch_the_same(args, times, batch, accumulation):
    found = smaller_batches({"args": args, "lora": None}, ["died", *["out of memory"] * times])["args"]
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (batch, accumulation)
    before = args.get("per_device_train_batch_size", 8) * args.get("gradient_accumulation_steps", 1)
    assert batch * accumulation == before
    # GRPO's completions per generation: batch x steps_per_generation, by default the accumulation
    if "steps_per_generation" in args:
        assert batch * found["steps_per_generation"] == args["per_device_train_batch_size"] * args["steps_per_generation"]


def test_other_failures_leave_the_settings_alone():
    config = {"args": {"per_device_train_batch_size": 16}}
    assert smaller_batches(config, ["died", "hang"]) is config
    assert StagePlacement().retries == 3
