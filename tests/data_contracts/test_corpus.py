"""Every malformed set of the corpus is refused at its lines and for its reason, and each without its defect is accepted."""

import datetime
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_contracts.contract import contract_for
from data_contracts.facts import facts
from data_contracts.held_out import HeldOut
from data_contracts.kinds import KINDS
from data_contracts.quarantine import Judged, judge_source
from data_contracts.rows import RowsRefused, read_rows
from tests.data_contracts.corpus import DEFECTS, EXAM, LAYOUTS, ROWS, TOOLS, WARNED, Defect, calls, clean, known

LM, PC, PROMPTS = "language_modeling", "prompt_completion", "prompt_only"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    exam = tmp_path_factory.mktemp("exam") / "exam.jsonl"
    exam.write_text("".join(json.dumps({"prompt": prompt, "answer": "yes"}) + "\n" for prompt in EXAM))
    return HeldOut.of(read_rows(exam, "eval"), "eval")


@pytest.fixture
def judged(held_out: HeldOut, tmp_path: Path):
    def judge(source: Path, kind: str, form: str) -> Judged:
        reading = {"layout": LAYOUTS[form]} if form in LAYOUTS else {}
        return judge_source(
            source, contract_for(kind), held_out, reading, tmp_path / "quarantine.jsonl", tmp_path / "canonical.parquet"
        )

    return judge


def named(table: dict[str, Defect]) -> list:
    return [pytest.param(defect, id=name.replace(" ", "-"), marks=defect.marks) for name, defect in table.items()]


@pytest.mark.parametrize("defect", named({name: it for name, it in DEFECTS.items() if it.reason}))
def test_corpus_rows_not_of_their_kind_are_refused_by_line_and_reason(defect, judged, write_rows):
    with pytest.raises(RowsRefused) as refused:
        judged(write_rows(defect.rows()), defect.kind, defect.form)
    assert tuple(line for line, _ in refused.value.problems) == defect.lines
    assert all(defect.reason in reason for _, reason in refused.value.problems), refused.value.problems[0]
    assert refused.value.total == len(defect.lines)


@pytest.mark.parametrize("defect", named({name: it for name, it in DEFECTS.items() if it.rule}))
def test_corpus_rows_that_mistrain_are_refused_by_line_and_rule(defect, judged, write_rows):
    found = judged(write_rows(defect.rows()), defect.kind, defect.form)
    assert not found.verdict.passed
    assert {it.rule for it in found.verdict.failures()} == {f"{defect.kind}-{it}" for it in (defect.rule, *defect.implied)}
    assert tuple(sorted(row.line for row in found.set_aside)) == defect.lines


@pytest.mark.parametrize("defect", named(WARNED))
def test_corpus_rows_to_look_at_are_warned_of_by_line(defect, judged, write_rows):
    verdict = judged(write_rows(defect.rows()), defect.kind, defect.form).verdict
    assert verdict.passed
    [warning] = [it for it in verdict.warnings() if it.rule == f"{defect.kind}-{defect.rule}"]
    assert warning.rows == defect.lines[:5]
    assert (warning.unexpected_count or 0) == len(defect.lines)


@pytest.mark.parametrize(("kind", "form"), sorted({(it.kind, it.form) for it in (DEFECTS | WARNED).values()}), ids="-".join)
def test_corpus_clean_twin_is_accepted_without_a_word(kind, form, judged, write_rows):
    found = judged(write_rows(clean(kind, form)), kind, form)
    assert found.verdict.passed and not found.set_aside
    assert {result.status for result in found.verdict.results} == {"PASS"}


LINES = [json.dumps(row).encode() for row in clean(LM, "standard")]
GOOD = b"\n".join(LINES) + b"\n"


def with_line(line: bytes) -> bytes:
    return b"\n".join([*LINES[:6], line, *LINES[7:]]) + b"\n"


# name: (file, what it holds, the line that is named, a part of the reason)
FILES = {
    "bytes of UTF-16": ("rows.jsonl", GOOD.decode().encode("utf-16"), 1, "not UTF-8"),
    "bytes of UTF-16 in an array": ("rows.json", b"[1]".decode().encode("utf-16"), 1, "not UTF-8"),
    "byte order mark": ("rows.jsonl", b"\xef\xbb\xbf" + GOOD, 1, "byte order mark"),
    "byte order mark in an array": ("rows.json", b'\xef\xbb\xbf[{"text": "a"}]', 1, "BOM"),
    "byte of Latin-1": ("rows.jsonl", with_line(b'{"text": "caf\xe9"}'), 7, "byte 0xe9 at column 14"),
    "byte of Windows-1252": ("rows.jsonl", with_line(b'{"text": "\x93so\x94"}'), 7, "byte 0x93"),
    "byte of Latin-1 in an array": ("rows.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', 2, "not UTF-8"),
    "overlong UTF-8": ("rows.jsonl", with_line(b'{"text": "\xc0\xaf"}'), 7, "not UTF-8"),
    "surrogate in UTF-8": ("rows.jsonl", with_line(b'{"text": "\xed\xa0\x80"}'), 7, "not UTF-8"),
    "surrogate escaped": ("rows.jsonl", with_line(b'{"text": "\\ud83d alone"}'), 7, "half of a surrogate pair"),
    "null byte": ("rows.jsonl", with_line(b'{"text": "a\x00b"}'), 7, "control character"),
    "tab inside a string": ("rows.jsonl", with_line(b'{"text": "a\tb"}'), 7, "control character"),
    "last line cut off": ("rows.jsonl", GOOD[:-9], ROWS, "invalid JSON"),
    "array cut off": ("rows.json", b'[{"text": "a"},\n{"text": "b', 2, "invalid JSON"),
    "array with a comma at its end": ("rows.json", b'[{"text": "a"},]', 1, "invalid JSON"),
    "object over lines": ("rows.jsonl", b'{\n"text": "a"\n}\n', 1, "one whole row per line"),
    "object of columns": ("rows.json", b'{"text": ["a", "b"]}', 1, "an object"),
    "two rows in one line": ("rows.jsonl", with_line(LINES[6] + LINES[7]), 7, "Extra data"),
    "line of Python": ("rows.jsonl", with_line(b"{'text': 'a'}"), 7, "invalid JSON"),
    "line of NaN": ("rows.jsonl", with_line(b'{"text": NaN}'), 7, "NaN"),
    "key twice": ("rows.jsonl", with_line(b'{"text": "a", "text": "b"}'), 7, "stands twice"),
    "line blank": ("rows.jsonl", with_line(b"  "), 7, "blank line"),
    "line of a comment": ("rows.jsonl", with_line(b"# the rest is new"), 7, "invalid JSON"),
    "line of a merge conflict": ("rows.jsonl", with_line(b"<<<<<<< HEAD"), 7, "invalid JSON"),
    "nesting without end": ("rows.jsonl", with_line(b'{"text": ' + b"[" * 100_000), 7, "invalid JSON"),
    "number of ten thousand digits": ("rows.jsonl", with_line(b'{"text": ' + b"9" * 10_000 + b"}"), 7, "invalid JSON"),
    "pointer of Git LFS": ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", 1, "invalid JSON"),
    "page of a login": ("rows.json", b"<!doctype html><title>Log in</title>", 1, "invalid JSON"),
    "gzip by another name": ("rows.jsonl", gzip.compress(GOOD), 1, "not UTF-8"),
    "gzip by another name in Parquet": ("rows.parquet", gzip.compress(GOOD), 1, "no readable Parquet"),
    "gzip by its name": ("rows.jsonl.gz", gzip.compress(GOOD), 1, "a .gz file is not read"),
    "CSV by its name": ("rows.csv", b"text\na\n", 1, "a .csv file is not read"),
    "CSV by another name": ("rows.jsonl", b"text\na\n", 1, "looks like CSV"),
    "CSV by the name of an array": ("rows.json", b"\xef\xbb\xbfprompt;completion\r\na;b\r\n", 1, "looks like CSV"),
    "CSV in quotes": ("rows.jsonl", b'"prompt","completion"\n"a, b","c"\n', 1, "looks like CSV"),
    "lines below a word": ("rows.jsonl", b"text\n" + GOOD, 1, "invalid JSON"),
    "lines by the name of an array": ("rows.json", GOOD, 2, "name the file .jsonl"),
    "array by the name of lines": ("rows.jsonl", b'[{"text": "a"},\n{"text": "b"}]', 1, "Name the file .json"),
    "array in a line": ("rows.jsonl", b'[{"text": "a"}, {"text": "b"}]\n', 1, "Name the file .json"),
    "lines by the name of Parquet": ("rows.parquet", GOOD, 1, "no readable Parquet"),
    "lines by the name of Arrow": ("rows.arrow", GOOD, 1, "no readable Arrow"),
    "nothing in lines": ("rows.jsonl", b"", 1, "is empty"),
    "nothing in an array": ("rows.json", b"[]", 1, "is empty"),
    "nothing in Parquet": ("rows.parquet", b"", 1, "no readable Parquet"),
}


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "-")) for name in FILES])
def test_corpus_file_that_is_broken_is_refused_by_line_and_reason(name, judged, tmp_path):
    file, content, line, reason = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RowsRefused) as refused:
        judged(tmp_path / file, LM, "standard")
    assert refused.value.problems[0][0] == line
    assert reason in refused.value.problems[0][1]


@pytest.mark.parametrize(
    ("name", "separator"), [("rows.csv", ","), ("rows.tsv", "\t"), ("rows.jsonl", ";"), ("rows.json", ",")]
)
def test_corpus_csv_is_read_once_converted_as_its_refusal_says(name, separator, judged, tmp_path):
    rows = [{"prompt": f'Say {n}, please; "now"\tor never', "completion": f"{n}" if n else "NA"} for n in range(ROWS)]
    pd.DataFrame(rows).to_csv(tmp_path / name, sep=separator, index=False)
    with pytest.raises(RowsRefused) as refused:
        judged(tmp_path / name, PC, "standard")
    command = re.search(r'python -c "(.*)"', refused.value.problems[0][1])[1]
    subprocess.run([sys.executable, "-c", command], check=True)
    assert read_rows(tmp_path / "rows-lines.jsonl", PC).drop(["row"]).to_pylist() == rows


def table_of(kind: str, form: str, change: Callable[[list[dict]], object] = lambda rows: None) -> pa.Table:
    rows = clean(kind, form)
    change(rows)
    return pa.Table.from_pylist(rows)


def texts(array: pa.Array) -> pa.Table:
    return pa.table({"text": array})


def undecodable(count: int) -> pa.Array:
    """Return strings that say they are UTF-8, the first of which is not."""
    whole = pa.array([f"é{n}" for n in range(count)])
    _, offsets, data = whole.buffers()
    return pa.Array.from_buffers(pa.string(), count, [None, offsets, pa.py_buffer(b"\xe9\xe9" + data.to_pybytes()[2:])])


def _twice() -> pa.Array:
    fields = [pa.array(["user"]), pa.array(["a"]), pa.array(["b"])]
    said = pa.StructArray.from_arrays(fields, names=["role", "content", "content"])
    return pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), said)


def _call(rows: list[dict], line: int) -> dict:
    return rows[line - 1]["messages"][1]["tool_calls"][0]["function"]


# name: (kind, table, the lines that are named, a part of the reason); marks
TABLES = {
    "texts null": (LM, lambda: texts(pa.nulls(3)), (1, 2, 3), "not null"),
    "text null": (LM, lambda: table_of(LM, "standard", lambda rows: rows[6].update(text=None)), (7,), "not null"),
    "texts of bytes": (LM, lambda: texts(pa.array([b"a"])), (1,), "not bytes"),
    "texts of numbers": (LM, lambda: texts(pa.array([1, 2])), (1, 2), "not int"),
    "texts that are not UTF-8": (LM, lambda: texts(undecodable(3)), (1,), "can't decode byte 0xe9"),
    "messages null": (LM, lambda: table_of(LM, "turns", lambda rows: rows[6].update(messages=None)), (7,), "messages must be"),
    "message null": (LM, lambda: table_of(LM, "turns", lambda rows: rows[6]["messages"].append(None)), (7,), "[5] must be"),
    "messages of other fields": (
        LM,
        lambda: pa.table({"messages": [[{"speaker": "user", "text": "a"}]]}),
        (1,),
        "role is missing",
    ),
    "messages with an empty field of images": (
        LM,
        lambda: pa.table({"messages": [[{"role": "user", "content": "a", "images": None}]]}),
        (1,),
        "images is not a",
    ),
    "messages as a map": (
        LM,
        lambda: pa.table({"messages": pa.array([[("user", "a")]], pa.map_(pa.string(), pa.string()))}),
        (1,),
        "must be a message",
    ),
    "labels of integers": (
        "unpaired_preference",
        lambda: table_of("unpaired_preference", "standard", lambda rows: [row.update(label=int(row["label"])) for row in rows]),
        tuple(range(1, ROWS + 1)),
        "label must be true or false, not int",
    ),
    "column twice": (LM, lambda: pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text"] * 2), (1,), "twice"),
    "index of pandas": (LM, lambda: pa.table({"text": ["a"], "__index_level_0__": [3]}), (1,), "__index_level_0__"),
    "extra column of dates": (
        PROMPTS,
        lambda: pa.table({"prompt": ["a"], "day": [datetime.date(2026, 1, 1)]}),
        (1,),
        "'day' must be",
    ),
    "extra column of dates beyond the calendar": (
        PROMPTS,
        lambda: pa.table({"prompt": ["a"], "day": pa.array([2**30], pa.date32())}),
        (1,),
        "no readable",
    ),
    "extra column of no name": (PROMPTS, lambda: pa.table({"prompt": ["a"], "": ["b"]}), (1,), "without a name"),
    "extra column of numbers that are none": (
        PROMPTS,
        lambda: pa.table({"prompt": ["a"], "weight": [float("nan")]}),
        (1,),
        "'weight' is nan",
    ),
    "arguments with a date": (
        LM,
        lambda: table_of(
            LM,
            "tools",
            lambda rows: [_call(rows, line + 1).update(arguments={"day": datetime.date.today()}) for line in range(ROWS)],
        ),
        tuple(range(1, ROWS + 1)),
        "what JSON cannot say",
    ),
    "arguments filled up with nulls": (
        LM,
        lambda: table_of(LM, "tools", lambda rows: _call(rows, 7).update(arguments={"food": "hay"})),
        tuple(range(1, ROWS + 1)),
        "null",
    ),
    "rows none": (LM, lambda: texts(pa.array([], pa.string())), (1,), "is empty"),
}
_FILLED = known("Arrow gives every call the arguments of all: nothing tells such a null from one that was meant")


def write_table(table: pa.Table, file: Path) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table)
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "name", [pytest.param(it, marks=_FILLED if "filled" in it else (), id=it.replace(" ", "-")) for it in TABLES]
)
def test_corpus_table_with_one_defect_is_refused_by_line_and_reason(name, suffix, judged, tmp_path):
    kind, table, lines, reason = TABLES[name]
    with pytest.raises(RowsRefused) as refused:
        judged(write_table(table(), tmp_path / f"rows{suffix}"), kind, "standard")
    assert tuple(line for line, _ in refused.value.problems) == lines
    assert all(reason in told for _, told in refused.value.problems), refused.value.problems[0]


def test_corpus_arrow_struct_with_a_field_twice_is_refused(judged, tmp_path):
    """Parquet's own writer refuses it."""
    with pytest.raises(RowsRefused, match="duplicate field names"):
        judged(write_table(pa.table({"messages": _twice()}), tmp_path / "rows.arrow"), LM, "conversational")


def test_corpus_parquet_cut_off_is_refused(judged, tmp_path):
    file = write_table(table_of(LM, "standard"), tmp_path / "rows.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RowsRefused, match="no readable Parquet"):
        judged(file, LM, "standard")


# name: (files of the folder, the line that is named, a part of the reason)
_ARRAY = b"[" + LINES[0] + b"]"
FOLDERS = {
    "of two formats": ({"a.jsonl": GOOD, "b.json": _ARRAY}, 1, "mixes .json and .jsonl"),
    "of nothing": ({"README.md": b"# Rows"}, 1, "holds no"),
    "with an empty part": ({"a.jsonl": GOOD, "b.jsonl": b""}, 1, "b.jsonl is empty"),
    "with a compressed part": ({"a.jsonl": GOOD, "b.jsonl.gz": gzip.compress(GOOD)}, 1, "b.jsonl.gz, which would be left out"),
    "with a part of CSV": ({"a.jsonl": GOOD, "b.csv": b"text\na\n"}, 1, "b.csv, which would be left out"),
    "with a folder of more": ({"a.jsonl": GOOD, "more/b.jsonl": GOOD}, 1, "more, which would be left out"),
    "with a folder by a file's name": ({"a.jsonl": GOOD, "b.jsonl/part-0": GOOD}, 1, "b.jsonl, which would be left out"),
    "with a bad row in its second part": ({"a.jsonl": GOOD, "b.jsonl": with_line(b"{}")}, ROWS + 7, "  b.jsonl:7: "),
    "of several splits": ({"dataset_dict.json": b'{"splits": ["train", "test"]}'}, 1, "train, test"),
    "of splits that are none": ({"dataset_dict.json": b"[]"}, 1, "dataset_dict.json is not what"),
    "saved and cut off": ({"state.json": b"{"}, 1, "state.json is not what"),
    "saved without its files": ({"state.json": b'{"_data_files": [{"filename": "data-0.arrow"}]}'}, 1, "data-0.arrow"),
    "saved of no file": ({"state.json": b'{"_data_files": []}'}, 1, "there is no row 0"),
    "saved of another format": ({"state.json": b'{"_data_files": [{"filename": "data-0.txt"}]}'}, 1, "no .arrow file"),
}


def write_folder(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "-")) for name in FOLDERS])
def test_corpus_folder_with_one_defect_is_refused_by_line_and_reason(name, judged, tmp_path):
    files, line, reason = FOLDERS[name]
    with pytest.raises(RowsRefused) as refused:
        judged(write_folder(files, tmp_path / "rows"), LM, "standard")
    [(told_line, _)] = refused.value.problems
    assert told_line == line and reason in str(refused.value)


def test_corpus_link_to_nowhere_in_a_folder_is_refused(judged, tmp_path):
    folder = write_folder({"a.jsonl": GOOD}, tmp_path / "rows")
    (folder / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RowsRefused, match="b.jsonl"):
        judged(folder, LM, "standard")


HARMLESS = {
    "lines that end as on Windows": GOOD.replace(b"\n", b"\r\n"),
    "no end of the last line": GOOD[:-1],
    "blank lines at the end": GOOD + b"\n \n",
    "text escaped": b"\n".join(json.dumps(row, ensure_ascii=True).encode() for row in clean(LM, "standard")),
}


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "-")) for name in HARMLESS])
def test_corpus_file_that_is_only_unusual_is_read_as_it_stands(name, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(HARMLESS[name])
    assert read_rows(tmp_path / "rows.jsonl", LM).drop(["row"]).to_pylist() == clean(LM, "standard")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("type_", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_corpus_strings_of_another_arrow_type_are_read_as_strings(type_, suffix, tmp_path):
    values = table_of(LM, "standard")["text"].combine_chunks()
    table = texts(values.dictionary_encode() if pa.types.is_dictionary(type_) else values.cast(type_))
    read = read_rows(write_table(table, tmp_path / f"rows{suffix}"), LM)
    assert read.drop(["row"]).to_pylist() == clean(LM, "standard")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_corpus_calls_in_arrow_are_read_like_the_lines_they_were_made_of(suffix, write_rows, tmp_path):
    """Arrow has every key in every message, with a null where there was none."""
    table = write_table(table_of(LM, "tools"), tmp_path / f"rows{suffix}")
    assert read_rows(table, LM).equals(read_rows(write_rows(clean(LM, "tools")), LM))


def test_corpus_extra_column_with_the_name_of_a_pattern_is_a_column(write_rows):
    rows = [{"prompt": "a", "*": "b", "^.*$": "c"}, {"prompt": "a", "*": "b", "^.*$": "c"}]
    assert facts(read_rows(write_rows(rows), PROMPTS), PROMPTS)["is_duplicate"].tolist() == [False, True]


def test_corpus_calls_with_nan_are_refused(write_rows):
    row = clean(LM, "tools")[0] | {"tools": json.dumps(TOOLS).replace('"object"', "NaN")}
    with pytest.raises(RowsRefused, match="NaN"):
        read_rows(write_rows([row]), LM)


_TEXT = st.text(max_size=8) | st.sampled_from(["", " ", "\u200b", "\x00", "[", '"q"', "null", "{{x}}", "<|im_end|>", "😀"])
_SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | _TEXT
_CALL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": _TEXT, "arguments": st.dictionaries(_TEXT, _SCALAR)}),
    }
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
    optional={
        "content": _TEXT | _SCALAR,
        "tool_calls": st.lists(_CALL, max_size=2) | _TEXT | st.none(),
        "tool_call_id": _TEXT | st.none(),
        "name": _TEXT,
    },
)
_ARGUMENTS = st.dictionaries(_TEXT, st.none() | st.integers() | _TEXT, max_size=2)
_TOOL_TURN = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _TEXT}),
    st.builds(calls, st.sampled_from(["menu", "weather"]), _ARGUMENTS),
    st.builds(lambda arguments: calls("menu", arguments) | {"content": "So:"}, _ARGUMENTS),
)
_VALUE = _SCALAR | _TEXT | st.lists(_MESSAGE | _SCALAR, max_size=4) | st.dictionaries(_TEXT, _SCALAR, max_size=3)
_OWN = {name for kind in KINDS.values() for form in ("standard", "conversational") for name in kind.columns(form)}
_ROW = st.dictionaries(
    st.sampled_from(sorted(_OWN | {"tools", "conversations", "instruction", "output"})) | _TEXT, _VALUE, max_size=5
)


def _near(kind: str) -> st.SearchStrategy[list[dict]]:
    """Return rows that have the columns of their kind, so that some are accepted and most are nearly."""
    of_kind = KINDS[kind]
    lists = {name: st.lists(_TEXT, min_size=1, max_size=2) for name in of_kind.steps}
    lists |= {
        name: st.booleans() if type_ is bool else st.lists(st.booleans(), min_size=1, max_size=2)
        for name, type_ in of_kind.labels.items()
    }

    def rows(form: str) -> st.SearchStrategy[list[dict]]:
        text = _TEXT if form == "standard" else st.lists(_MESSAGE, min_size=1, max_size=3)
        columns = dict.fromkeys(of_kind.fields(form), text) | dict.fromkeys(of_kind.strings, _TEXT) | lists
        return st.lists(st.fixed_dictionaries(columns), max_size=4)

    def rows_with_tools() -> st.SearchStrategy[list[dict]]:
        columns = dict.fromkeys(of_kind.conversational, st.lists(_TOOL_TURN, min_size=1, max_size=3)) | lists
        return st.lists(st.fixed_dictionaries(columns | {"tools": st.just(TOOLS) | st.just([])}), max_size=3)

    if of_kind.takes_tools:
        return rows("standard") | rows("conversational") | rows_with_tools()
    return rows("standard") | rows("conversational") if of_kind.conversational else rows("standard")


def _plain(row: dict) -> dict:
    """Return a row as it stands in a file: no key that is null in every message, calls and tools as objects."""
    plain = {}
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = [_plain_turn(turn) for turn in value]
        plain[name] = _decoded(value) if name == "tools" else value
    return plain


def _plain_turn(turn: dict) -> dict:
    turn = {key: _decoded(value) if key == "tool_calls" else value for key, value in turn.items()}
    return {key: value for key, value in turn.items() if value is not None}


def _decoded(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), suffix=st.sampled_from([".jsonl", ".json"]))
def test_corpus_rows_at_random_are_judged_or_refused_and_kept_verbatim(data, kind, suffix, write_rows):
    rows = data.draw(_near(kind) | st.lists(_ROW, max_size=4))
    path = write_rows(rows, f"random{suffix}")
    try:
        table = read_rows(path, kind)
    except RowsRefused:
        return
    assert len(facts(table, kind, {"x"}, frozenset({" ".join("y" * 13)}))) == len(rows)
    kept = [_plain(row) for row in table.drop(["row"]).to_pylist()]
    given_rows = [_plain(row) for row in rows]
    if kind == "preference" and "prompt" not in rows[0]:
        kept = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in kept]
    if kind == "unpaired_preference" and "messages" in rows[0]:
        kept = [{"messages": row["prompt"] + row["completion"], "label": row["label"]} for row in kept]
    assert kept == given_rows


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".parquet", ".arrow"]))
def test_corpus_bytes_at_random_are_rows_or_refused(content, suffix, tmp_path):
    file = tmp_path / f"random{suffix}"
    file.write_bytes(content)
    with pytest.raises(RowsRefused):  # no bytes that come up by chance are a row of text
        read_rows(file, LM)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".json", ".parquet", ".arrow"]))
def test_corpus_file_with_damaged_bytes_is_read_or_refused(data, suffix, write_rows, tmp_path):
    rows = clean(LM, "standard")[:3]
    good = (
        write_rows(rows, f"rows{suffix}")
        if suffix.startswith(".json")
        else write_table(pa.Table.from_pylist(rows), tmp_path / f"rows{suffix}")
    )
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        table = read_rows(file, LM)
    except RowsRefused:
        return
    assert len(facts(table, LM)) == table.num_rows


def found_in(source: Path, kind: str, **reading):
    table = read_rows(source, kind, **reading)
    return table, facts(table, kind)


def repeats(values: list) -> int:
    return len(values) - len(set(values))


def levelled(text: str) -> str:
    return " ".join(text.casefold().split())


def test_corpus_gsm8k_has_every_row_and_no_question_of_its_exam(shared_data, tmp_path):
    raw = {
        name: [json.loads(line) for line in (shared_data / "gsm8k" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "test")
    }
    exam = read_rows(shared_data / "gsm8k/test.jsonl", "eval", columns={"prompt": "question", "answer": "answer"})
    judged = judge_source(
        shared_data / "gsm8k/train.jsonl",
        contract_for(PC),
        HeldOut.of(exam, "eval"),
        {"columns": {"prompt": "question", "completion": "answer"}},
        tmp_path / "quarantine.jsonl",
        tmp_path / "canonical.parquet",
    )
    assert (judged.rows.num_rows, exam.num_rows) == (len(raw["train"]), len(raw["test"]))
    assert judged.rows.table()["prompt"].to_pylist() == [row["question"] for row in raw["train"]]
    asked = {levelled(row["question"]) for row in raw["test"]}
    assert judged.facts["overlaps_eval"].sum() == sum(levelled(row["question"]) in asked for row in raw["train"])
    assert judged.facts["quotes_eval"].tolist() == _quoting(raw["train"], asked)
    assert judged.facts["is_duplicate_prompt"].sum() == repeats([row["question"] for row in raw["train"]])
    assert judged.verdict.passed


def _quoting(rows: list[dict], asked: set[str], size: int = 13) -> list[bool]:
    def passages(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(*(words[start:] for start in range(size)), strict=False))

    counts = Counter(passage for text in asked for passage in passages(text))
    own = {passage for passage, count in counts.items() if count == 1}
    return [not own.isdisjoint(passages(levelled(f"{row['question']}\n{row['answer']}"))) for row in rows]


def test_corpus_alpaca_demo_has_the_repeats_and_markers_that_are_known(shared_data):
    file = shared_data / "llama-factory-demo/alpaca_en_demo.json"
    raw = json.loads(file.read_text("utf-8"))
    table, found = found_in(file, PC, layout="alpaca")
    prompts = [f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"] for row in raw]
    no_input = [row for row in raw if row["input"].strip(" <>`.").replace(" ", "").casefold() == "noinput"]
    assert (table.num_rows, len(raw)) == (999, 999)
    assert found["is_duplicate_prompt"].sum() == repeats(prompts) == 14
    assert found["has_placeholder"].sum() == len(no_input) == 8
    assert 1 in found["completion_chars"].tolist() and not found["n_empty_messages"].any()


def test_corpus_dpo_demo_has_the_repeats_and_ties_that_are_known(shared_data):
    file = shared_data / "llama-factory-demo/dpo_en_demo.json"
    raw = json.loads(file.read_text("utf-8"))
    table, found = found_in(file, "preference", layout="sharegpt")
    assert table.num_rows == len(raw) == 300
    assert found["is_duplicate_prompt"].sum() == repeats([json.dumps(row["conversations"]) for row in raw]) == 5
    longer = [len(row["chosen"]["value"]) > len(row["rejected"]["value"]) for row in raw]
    assert found["is_chosen_longer"].tolist() == longer
    ties = [row["chosen"]["value"].strip() == row["rejected"]["value"].strip() for row in raw]
    assert found["is_tie"].tolist() == ties


def test_corpus_kto_demo_has_the_labels_and_repeats_that_are_counted(shared_data):
    file = shared_data / "llama-factory-demo/kto_en_demo.json"
    raw = json.loads(file.read_text("utf-8"))
    table, found = found_in(file, "unpaired_preference")
    assert table.num_rows == len(raw) == 300
    assert Counter(found["is_desired"].tolist()) == Counter(row["label"] for row in raw)
    prompts = [[[turn["role"], turn["content"]] for turn in row["messages"][:-1]] for row in raw]
    assert found["is_duplicate_prompt"].sum() == repeats([json.dumps(prompt) for prompt in prompts])
    assert found["is_garbled"].tolist() == ["Ã" in json.dumps(row["messages"], ensure_ascii=False) for row in raw]


def test_corpus_identity_is_refused_for_the_names_it_leaves_open(shared_data, tmp_path):
    file = shared_data / "llama-factory-demo/identity.json"
    lines = [n for n, row in enumerate(json.loads(file.read_text("utf-8")), start=1) if "{{" in json.dumps(row)]
    judged = judge_source(
        file, contract_for(PC), None, {"layout": "alpaca"}, tmp_path / "quarantine.jsonl", tmp_path / "canonical.parquet"
    )
    assert [failure.rule for failure in judged.verdict.failures()] == [f"{PC}-placeholder"]
    assert sorted(row.line for row in judged.set_aside) == lines and len(lines) == 85 and judged.rows.num_rows == 91


def test_corpus_ifeval_has_a_prompt_for_every_row(shared_data):
    file = shared_data / "ifeval/input_data.jsonl"
    raw = [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()]
    table, found = found_in(file, PROMPTS, columns={"prompt": "prompt"})
    assert table["prompt"].to_pylist() == raw and len(raw) == 541
    assert found["is_duplicate_prompt"].sum() == repeats(raw)
    assert found["prompt_chars"].tolist() == [len(prompt) for prompt in raw]
