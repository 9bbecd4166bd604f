"""Rows per second and peak memory of the data path: strict read, facts about the text, the contract's suite; and two floors.

    .venv/bin/python benchmarks/contracts.py                       10,000 and 100,000 rows, some five minutes
    .venv/bin/python benchmarks/contracts.py --rows 1000000        3 GB of disk

The rows are conversational preference rows of about 365 words, made from a seed. Each step is a process of its own, so that
the peak is its own too; its imports, whose peak stands last, are in the peak and not in the time. Where other work shares the
machine, the CPU seconds (of all threads) say more than the seconds. The floor is what polars alone takes to scan the canonical
Parquet and count what two of the facts count: no tool that judges texts will be faster.

Facts about tokens are made of the first 10,000 rows, in the job environment and by the tokenizer of `--model`. Their floor is
that tokenizer's own batch encoding of the texts that the facts encode, rendered beforehand: each pair's two replies behind
their prompt, and its prompt for each. The two are measured batch by batch in turn: what else the machine does slows both.
"""

import argparse
import itertools
import json
import os
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
TOKENS = "token facts"
TOKEN_ROWS = 10_000
HELD_OUT = 1300  # prompts of about 50 words, as many as GSM8K's test set has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", type=Path, default=PROJECT / "models/SmolLM2-135M-Instruct", help="whose tokenizer it is")
    parser.add_argument("--step", choices=[*STEPS, TOKENS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step == TOKENS:
        print(json.dumps(tokens(asked.folder, asked.model)))
        return
    if asked.step:
        print(json.dumps(measured(STEPS[asked.step], asked.folder)))
        return
    print(f"{'rows':>9}  {'step':22} {'seconds':>8} {'k rows/s':>9} {'CPU s':>7} {'peak MB':>8} {'before':>6}")
    for n_rows in asked.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "rows.jsonl", n_rows)
            for step in STEPS:
                show(n_rows, step, *run(sys.executable, step, Path(folder)))
            show_tokens(min(n_rows, TOKEN_ROWS), Path(folder), asked.model)


def show(n_rows: int, step: str, seconds: float, cpu: float, peak: float, before: float) -> None:
    rate = n_rows / seconds / 1000
    print(f"{n_rows:9,}  {step:22} {seconds:8.2f} {rate:9.1f} {cpu:7.2f} {peak:8.0f} {before:6.0f}", flush=True)


def show_tokens(n_rows: int, folder: Path, model: Path) -> None:
    """Measure the facts about tokens and their floor in the job environment, as the validate stage makes them."""
    python = Path(f"{sys.prefix}-job") / "bin" / "python"
    if not model.is_dir() or not python.is_file():
        print(f"no facts about tokens: they need a tokenizer (--model {model}) and the job environment ({python})")
        return
    facts, facts_cpu, floor, floor_cpu, peak, before = run(str(python), TOKENS, folder, "--model", str(model))
    show(n_rows, TOKENS, facts, facts_cpu, peak, before)
    show(n_rows, "… encoding alone", floor, floor_cpu, peak, before)
    print(f"{'':9}  {'… times as long':22} {facts / floor:8.2f}", flush=True)


def write_rows(file: Path, count: int) -> None:
    """Write preference rows, one in four of which has three turns before the reply, and the held-out prompts beside them."""
    choose = random.Random(0)
    words = ["".join(choose.choices(string.ascii_lowercase, k=choose.randint(2, 10))) for _ in range(20_000)]
    frequency = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))  # as Zipf found it

    def turn(role: str, n_words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(choose.choices(words, cum_weights=frequency, k=n_words)) + ".\n"}

    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            prompt = [turn("user", 65)] if number % 4 else [turn("user", 30), turn("assistant", 25), turn("user", 10)]
            replies = {side: [turn("assistant", choose.randint(100, 200))] for side in ("chosen", "rejected")}
            lines.write(json.dumps({"prompt": prompt} | replies) + "\n")
    with file.with_name("held_out.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"prompt": [turn("user", 50)], "answer": "6"}) + "\n" for _ in range(HELD_OUT))


def run(python: str, step: str, folder: Path, *options: str) -> tuple[float, ...]:
    """Return a step's seconds and CPU seconds in a fresh process, its peak memory, and that of its imports alone, in MB."""
    command = [python, "-P", __file__, "--step", step, "--folder", str(folder), *options]
    env = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def measured(step: Callable[[Path], Callable[[], object]], folder: Path) -> tuple[float, ...]:
    work = step(folder)
    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu, peak_mb(), before


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(folder: Path) -> Callable[[], object]:
    """Lines to nothing: what the check alone costs."""
    from data_contracts.rows import read_into

    return lambda: read_into(lambda table: None, folder / "rows.jsonl", "preference")


def store(folder: Path) -> Callable[[], object]:
    """Lines to canonical Parquet, as the validate stage does."""
    from data_contracts.rows import store_rows

    return lambda: store_rows(folder / "rows.jsonl", "preference", folder / "rows.parquet")


def floor(folder: Path) -> Callable[[], object]:
    import polars as pl

    texts = pl.col("chosen").list.eval(pl.element().struct.field("content"))
    is_empty = pl.element().struct.field("content").str.strip_chars() == ""
    counts = (
        pl.len(),
        texts.list.eval(pl.element().str.len_chars()).list.sum().mean(),
        pl.col("prompt").list.eval(is_empty).list.any().sum(),
    )
    return lambda: pl.scan_parquet(folder / "rows.parquet").select(*counts).collect(engine="streaming")


def facts(folder: Path) -> Callable[[], object]:
    from data_contracts.canonical import RowsFile
    from data_contracts.facts import facts

    return lambda: facts(RowsFile.at(folder / "rows.parquet"), "preference").to_parquet(folder / "facts.parquet")


def leaks(folder: Path) -> Callable[[], object]:
    """Facts with a search for held-out prompts and their passages."""
    from data_contracts.canonical import RowsFile
    from data_contracts.facts import facts
    from data_contracts.held_out import HeldOut
    from data_contracts.rows import read_rows

    held_out = HeldOut.of(read_rows(folder / "held_out.jsonl", "eval"), "eval")
    hidden, rows = (held_out.prompts, held_out.passages), RowsFile.at(folder / "rows.parquet")
    return lambda: facts(rows, "preference", *hidden).to_parquet(folder / "facts.parquet")


def judge(folder: Path) -> Callable[[], object]:
    import great_expectations  # noqa: F401  5 s and 260 MB, which are no part of the time
    import pandas as pd

    from data_contracts.contract import judge

    table = pd.read_parquet(folder / "facts.parquet")
    return lambda: judge(table, "preference")


def tokens(folder: Path, model: Path) -> tuple[float, ...]:
    """Return seconds and CPU seconds of the facts, the same of encoding alone, and the peaks with and without the work."""
    import pyarrow.parquet as pq
    from transformers.utils import logging

    from tasks.jobs.tokenize_rows import Use, load_tokenizer

    logging.set_verbosity_error()
    tokenizer = load_tokenizer(str(model), {})
    use = Use("dpo", {}, tokenizer, None)
    before, spent = peak_mb(), [0.0] * 4
    for batch in itertools.islice(pq.ParquetFile(folder / "rows.parquet").iter_batches(1000), TOKEN_ROWS // 1000):
        rows = batch.to_pylist()
        for at, work, given in ((0, use.facts, rows), (2, tokenizer, rendered(tokenizer, rows))):
            start, cpu = time.perf_counter(), time.process_time()
            work(given)
            spent[at] += time.perf_counter() - start
            spent[at + 1] += time.process_time() - cpu
    return *spent, peak_mb(), before


def rendered(tokenizer, rows: list[dict]) -> list[str]:
    def text(turns: list[dict], opens_reply: bool = False) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens_reply)

    sides = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    return [text(prompt, opens_reply=True) for prompt, _ in sides] + [text(prompt + reply) for prompt, reply in sides]


STEPS = {
    "strict read": read,
    "… into Parquet": store,
    "polars floor": floor,
    "facts": facts,
    "… with held-out rows": leaks,
    "GX suite": judge,
}

if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))  # `-P` leaves the working directory out
    main()
