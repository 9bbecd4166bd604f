"""Reading is strict: what is kept is kept verbatim, and every bad row is named."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_contracts.kinds import KINDS
from data_contracts.rows import RowsRefused, read_rows

U = {"role": "user", "content": "Say 6"}
A = {"role": "assistant", "content": "6."}

# One defect each, put in place of the seventh of ten clean rows.
DEFECTS = {
    "content is a number": ("preference", "conversational", {"chosen": [{"role": "assistant", "content": 6}]}),
    "content is null": ("preference", "conversational", {"chosen": [{"role": "assistant", "content": None}]}),
    "content is a list": (
        "language_modeling",
        "conversational",
        {"messages": [U, {"role": "assistant", "content": [{"type": "text", "text": "6"}]}]},
    ),
    "content is missing": ("prompt_completion", "conversational", {"completion": [{"role": "assistant"}]}),
    "role is missing": ("prompt_completion", "conversational", {"prompt": [{"content": "Say 6"}]}),
    "role is unknown": ("prompt_only", "conversational", {"prompt": [{"role": "human", "content": "Say 6"}]}),
    "role has a capital": ("eval", "conversational", {"prompt": [{"role": "User", "content": "Say 6"}]}),
    "message has an extra key": ("language_modeling", "conversational", {"messages": [U, A | {"name": "bot"}]}),
    "message is a string": ("language_modeling", "conversational", {"messages": ["Say 6", A]}),
    "messages are null": ("language_modeling", "conversational", {"messages": None}),
    "messages are none": ("language_modeling", "conversational", {"messages": []}),
    "messages are JSON in a string": ("preference", "conversational", {"chosen": json.dumps([A])}),
    "text is a number": ("language_modeling", "standard", {"text": 6}),
    "text is true": ("language_modeling", "standard", {"text": True}),
    "completion is null": ("prompt_completion", "standard", {"completion": None}),
    "prompt is a string among conversations": ("preference", "conversational", {"prompt": "Say 6"}),
    "row is standard among conversations": (
        "prompt_completion",
        "conversational",
        {"prompt": "Say", "completion": "6"},
    ),
    "row is a conversation among strings": ("prompt_completion", "standard", {"prompt": [U], "completion": [A]}),
    "unknown column": ("preference", "standard", {"score": 0.5}),
    "answer is a number": ("eval", "standard", {"answer": 6}),
    "extra column changes type": ("prompt_only", "standard", {"solution": 6}),
    "extra column has an integer for a float": ("prompt_only", "standard", {"weight": 3}),
    "extra column is null": ("prompt_only", "standard", {"solution": None}),
    "extra column is a list": ("eval", "conversational", {"topic": ["numbers"]}),
    "extra column appears late": ("prompt_only", "standard", {"hint": "six"}),
    "extra column is too big": ("prompt_only", "standard", {"level": 2**63}),
    "extra column has a reserved name": ("prompt_only", "standard", {"completions": "6"}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_rows_with_one_defect_are_refused_by_line(defect, write_rows, clean_rows):
    kind, form, change = DEFECTS[defect]
    rows = clean_rows(kind, form, 10)
    rows[6] = rows[6] | change
    with pytest.raises(RowsRefused) as refused:
        read_rows(write_rows(rows), kind)
    assert [line for line, _ in refused.value.problems] == [7]
    assert refused.value.total == 1


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_rows_without_a_column_are_refused_by_line(column, write_rows, clean_rows):
    rows = clean_rows("preference", "standard", 10)
    del rows[6][column]
    with pytest.raises(RowsRefused) as refused:
        read_rows(write_rows(rows), "preference")
    assert [line for line, _ in refused.value.problems] == [7]
    assert column in refused.value.problems[0][1]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "cut',
        b'{"text": "caf\xe9"}',
        b'{"text": NaN}',
        b'{"text": "kept", "text": "lost"}',
        b'{"text": "\\ud800"}',
        b"",
        b'["a row as a list"]',
        b'"a row as a string"',
        b"null",
        b"[" * 100_000,
    ],
    ids=lambda line: line[:20].decode("latin-1"),
)
def test_rows_with_one_broken_line_are_refused_by_line(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\n' + line + b'\n{"text": "four"}\n')
    with pytest.raises(RowsRefused) as refused:
        read_rows(path, "language_modeling")
    assert [line for line, _ in refused.value.problems] == [3]


def test_rows_clean_of_each_kind_are_kept_verbatim(kind_and_form, write_rows, clean_rows):
    rows = clean_rows(*kind_and_form, 10)
    table = read_rows(write_rows(rows), kind_and_form[0])
    assert table.to_pylist() == [row | {"row": number} for number, row in enumerate(rows)]


def test_rows_with_text_that_looks_like_something_else_are_kept_verbatim(write_rows):
    texts = [
        '"quoted"',
        "5",
        "null",
        "[1]",
        " \u2028 line separator",
        "\u0000",
        "é",
        '{"text": 1}',
        "  spaces  ",
        "a\r\nb",
    ]
    table = read_rows(write_rows([{"text": text} for text in texts]), "language_modeling")
    assert table["text"].to_pylist() == texts


def test_rows_from_every_format_are_one_table(write_rows, clean_rows, tmp_path):
    rows = clean_rows("preference", "conversational", 10)
    lines = read_rows(write_rows(rows), "preference")
    assert read_rows(write_rows(rows, "rows.json"), "preference") == lines
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet", "preference") == lines
    write_rows(rows[:4], "folder/part-1.jsonl")
    write_rows(rows[4:], "folder/part-2.jsonl")
    assert read_rows(tmp_path / "folder", "preference") == lines


def test_rows_from_a_canonical_parquet_are_read_again_the_same(kind_and_form, write_rows, clean_rows, tmp_path):
    kind, form = kind_and_form
    table = read_rows(write_rows(clean_rows(kind, form, 10)), kind)
    pq.write_table(table, tmp_path / "canonical.parquet")
    assert read_rows(tmp_path / "canonical.parquet", kind) == table


def test_rows_refused_from_a_folder_name_the_file_and_its_line(write_rows, clean_rows):
    rows = clean_rows("eval", "standard", 10)
    write_rows(rows[:4], "folder/part-1.jsonl")
    folder = write_rows([*rows[4:6], {"prompt": "x", "answer": 1}], "folder/part-2.jsonl").parent
    with pytest.raises(RowsRefused) as refused:
        read_rows(folder, "eval")
    assert refused.value.problems[0][0] == 7  # of the folder
    assert "  part-2.jsonl:3: answer must be" in str(refused.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_that_are_not_as_those_of_another_file_name_both(suffix, write_rows, clean_rows):
    write_rows(clean_rows("eval", "standard", 3), f"folder/part-1{suffix}")
    folder = write_rows(clean_rows("eval", "conversational", 2), f"folder/part-2{suffix}").parent
    with pytest.raises(RowsRefused) as refused:
        read_rows(folder, "eval")
    one, two = f"part-1{suffix}", f"part-2{suffix}"
    assert f"  {two}:1, {two}:2: conversational, but {one}:1 is standard" in str(refused.value)


def test_rows_with_many_defects_are_all_counted_and_a_thousand_kept(write_rows):
    rows = [{"text": n if n % 2 else "fine"} for n in range(3000)]
    with pytest.raises(RowsRefused) as refused:
        read_rows(write_rows(rows), "language_modeling")
    assert refused.value.total == 1500
    assert [line for line, _ in refused.value.problems] == list(range(2, 2002, 2))


def test_rows_refused_is_told_with_file_kind_count_lines_and_reason(write_rows, clean_rows):
    rows = clean_rows("language_modeling", "standard", 10)
    rows[2] = rows[5] = {"text": None}
    path = write_rows(rows)
    with pytest.raises(RowsRefused) as refused:
        read_rows(path, "language_modeling")
    told = str(refused.value)
    assert all(word in told for word in (str(path), "language_modeling", "2 problems", "line 3, 6", "text", "null"))
    assert str(pickle.loads(pickle.dumps(refused.value))) == told  # it crosses processes whole


def test_rows_refused_for_many_values_of_one_sort_are_told_in_one_line(tmp_path):
    bad = [{"text": f"{n}", "label": n} if n % 3 else {"text": n} for n in range(500)]
    lines = [b"\xe9" * (n % 2) + json.dumps(row).encode() + b"}" * (n % 5 == 0) for n, row in enumerate(bad)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(RowsRefused) as refused:
        read_rows(tmp_path / "rows.jsonl", "language_modeling")
    told = str(refused.value).splitlines()
    # bytes that are no UTF-8, columns that are too many, texts that are numbers, JSON with one brace too many
    assert len(told[1:-1]) == 4 and "more reasons" not in str(refused.value)
    [numbers] = [line for line in told if "must be a string" in line]
    assert "line 7, 13, 19, 25, 37 and 62 more: e.g. text must be a string, not int 6" in numbers


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jsonl", None),
        ("empty.jsonl", b""),
        ("blank.jsonl", b"\n\n"),
        ("empty.json", b""),
        ("none.json", b"[]"),
        ("object.json", b'{"text": "one"}'),
        ("lines.json", b'{"text": "one"}\n{"text": "two"}\n'),
        ("latin.json", b'[{"text": "caf\xe9"}]'),
        ("array.jsonl", b'[\n{"text": "one"}\n]\n'),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "one"}\n'),
        ("junk.parquet", b"PAR1 no"),
        ("rows.csv", b"text\none\n"),
    ],
)
def test_rows_of_an_unreadable_source_are_refused(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RowsRefused):
        read_rows(tmp_path / name, "language_modeling")


def test_rows_of_an_empty_or_mixed_folder_are_refused(write_rows, tmp_path):
    (tmp_path / "nothing").mkdir()
    write_rows([{"text": "one"}], "mixed/a.jsonl")
    write_rows([{"text": "two"}], "mixed/b.json")
    for folder in ("nothing", "mixed"):
        with pytest.raises(RowsRefused):
            read_rows(tmp_path / folder, "language_modeling")


@pytest.mark.parametrize(("given", "asked"), [("preference", "prompt_completion"), ("prompt_completion", "preference")])
def test_rows_of_another_kind_are_named_by_it(given, asked, write_rows, clean_rows):
    with pytest.raises(RowsRefused) as refused:
        read_rows(write_rows(clean_rows(given, "standard", 3)), asked)
    assert f"look like {given} rows" in str(refused.value)


@pytest.mark.parametrize(
    ("row", "layout"),
    [({"instruction": "a", "input": "", "output": "b"}, "alpaca"), ({"conversations": []}, "sharegpt")],
)
def test_rows_of_another_layout_are_named_by_it(row, layout, write_rows):
    with pytest.raises(RowsRefused) as refused:
        read_rows(write_rows([row]), "prompt_completion")
    assert repr(layout) in str(refused.value)


def test_rows_sliced_keep_their_numbers_in_the_source(write_rows, clean_rows):
    rows = clean_rows("eval", "standard", 10)
    rows[9] = {"prompt": 1, "answer": 1}  # outside the slice: another split's business
    path = write_rows(rows)
    assert read_rows(path, "eval", start=3, stop=6)["row"].to_pylist() == [3, 4, 5]
    with pytest.raises(RowsRefused) as refused:
        read_rows(path, "eval", start=8)
    assert [line for line, _ in refused.value.problems] == [10]


def test_rows_sliced_beyond_the_end_are_refused(write_rows, clean_rows):
    path = write_rows(clean_rows("eval", "standard", 10))
    assert read_rows(path, "eval", start=9, stop=99).num_rows == 1
    with pytest.raises(RowsRefused):
        read_rows(path, "eval", start=10)


@pytest.mark.parametrize("asked", [{"kind": "dpo"}, {"layout": "chatml"}, {"start": -1}, {"start": 2, "stop": 2}])
def test_rows_asked_for_what_is_not_there_are_a_value_error(asked, write_rows, clean_rows):
    path = write_rows(clean_rows("eval", "standard", 10))
    with pytest.raises(ValueError, match=str(next(iter(asked.values())))):
        read_rows(path, **({"kind": "eval"} | asked))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": _VALUES}))
_COLUMNS = st.sampled_from(
    ["text", "messages", "prompt", "completion", "chosen", "rejected", "answer", "instruction", "output", "row", "x"]
)
_ROWS = st.lists(st.dictionaries(_COLUMNS, _VALUES | _MESSAGES, max_size=4) | _VALUES, max_size=4)


def _as_written(rows: list[dict]) -> list[dict]:
    """Return rows with a prompt apart as they stand in a file without one."""
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=_ROWS, kind=st.sampled_from(list(KINDS)), suffix=st.sampled_from([".jsonl", ".json"]))
def test_rows_at_random_are_kept_verbatim_or_refused(rows, kind, suffix, write_rows):
    """Whatever stands in the file, no reader's traceback comes out, and what is kept is what stood there."""
    path = write_rows(rows, f"random{suffix}")
    try:
        kept = read_rows(path, kind).drop(["row"]).to_pylist()
    except RowsRefused:
        return
    assert rows in (kept, _as_written(kept) if kind == "preference" else kept)


@pytest.mark.parametrize("write", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_arrow_in_both_of_its_formats_is_read_like_the_lines_it_was_made_of(
    write, kind_and_form, clean_rows, write_rows, tmp_path
):
    rows = clean_rows(*kind_and_form, 5)
    table = pa.Table.from_pylist(rows)
    with write(tmp_path / "rows.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    kind = kind_and_form[0]
    assert read_rows(tmp_path / "rows.arrow", kind).equals(read_rows(write_rows(rows), kind))


def test_folder_that_datasets_saved_is_read_in_the_order_it_names(tmp_path):
    """As `Dataset.save_to_disk(..., num_shards=2)` leaves it: the JSON files beside the shards are not data."""
    for name, text in (("b.arrow", "first"), ("a.arrow", "second")):
        table = pa.table({"text": [text]})
        with pa.ipc.new_stream(tmp_path / name, table.schema) as sink:
            sink.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}')
    assert read_rows(tmp_path, "language_modeling")["text"].to_pylist() == ["first", "second"]


def test_folder_of_several_splits_names_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(RowsRefused, match="train, test"):
        read_rows(tmp_path, "language_modeling")


@pytest.mark.parametrize("content", [b"", b"nothing of the sort", b"ARROW1\x00\x00"])
def test_file_that_is_no_arrow_is_refused(content, tmp_path):
    (tmp_path / "rows.arrow").write_bytes(content)
    with pytest.raises(RowsRefused, match="rows.arrow"):
        read_rows(tmp_path / "rows.arrow", "language_modeling")
