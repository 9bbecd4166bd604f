"""Lines read natively are the lines read one by one: the same rows and values, the same refusals in the same words."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_contracts import native, rows
from data_contracts.kinds import KINDS
from data_contracts.native import native_reader
from data_contracts.rows import MESSAGES, RowsRefused, read_rows

PAIRS = pa.schema([("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES), ("row", pa.int64())])
CLEAN = (
    '{"prompt": [{"role": "user", "content": "Say 6"}], "chosen": [%s], "rejected": [{"role": "assistant", "content": "No"}]}\n'
)
TURN = '{"role": "assistant", "content": "6."}'

# Tokens as they stand in a file; each may take the place of a key or of a value.
_KEYS = st.sampled_from(["role", "content", "prompt", "chosen", "text", "label", "answer", "row", "x", ""]).map(json.dumps)
_ESCAPED = st.sampled_from([r'"rol\u0065"', r'"\u0063ontent"', r'"prom\u0070t"', r'"te\u0078t"', r'"\u006cabel"'])
_ODD = st.sampled_from(
    [
        r'"\ud800"',
        r'"\udc00 low"',
        r'"\ud83d\ude00"',
        r'"\uD83D"',
        '"\\u0000"',
        '"\x01"',
        '"\x7f"',
        '"a\tb"',
        '"\\x"',
        "'a'",
        '"\u2028"',
    ]
    + [
        "NaN",
        "-Infinity",
        "1e999",
        "-0",
        "01",
        "1.0",
        "3",
        "9" * 25,
        "null",
        "true",
        "false",
        "[]",
        "{}",
        '[""]',
        '[{"role": 1}]',
    ]
    + [r'"\"role\": \"user\""', '"role"', r'"\\"', r'"\"plain\""', '"\ufeff"', '"é"', "\x0c", "//", "", '"user"', '"User"']
)
_STRINGS = st.text(max_size=8).map(json.dumps) | st.text(max_size=8).map(lambda text: json.dumps(text, ensure_ascii=False))
_SPACE = st.sampled_from([""] * 6 + [" ", "  ", "\t", "\r", "\x0b", "\u00a0"])


@st.composite
def written(draw, value: object, calm: bool) -> str:
    """Return a value as JSON; unless it is calm, here and there with something else than belongs in its place."""
    if not calm and draw(st.integers(0, 25)) == 0:
        return draw(_ODD | _STRINGS)
    space = "" if calm else draw(_SPACE)
    if isinstance(value, dict):
        pairs = [(json.dumps(key), draw(written(it, calm))) for key, it in value.items()]
        if not calm and draw(st.integers(0, 9)) == 0:
            pairs.pop()
        if not calm and pairs and draw(st.integers(0, 5)) == 0:
            again = st.sampled_from(pairs).map(lambda pair: pair[0]) | _KEYS | _ESCAPED
            pairs.insert(draw(st.integers(0, len(pairs))), (draw(again), draw(_ODD | _STRINGS)))
        return "{" + ", ".join(f"{space}{key}{space}: {it}{space}" for key, it in pairs) + "}"
    if isinstance(value, list):
        return "[" + f"{space}, ".join(draw(written(it, calm)) for it in value) + space + "]"
    if isinstance(value, str) and not calm:
        return draw(st.just(json.dumps(value)) | _STRINGS) if len(value) > 9 else json.dumps(value)
    return json.dumps(value)


@st.composite
def files(draw, clean: list[dict]) -> bytes:
    """Return a .jsonl file: mostly the clean rows, some of them not as they should be."""
    broken = (
        st.sampled_from(clean).flatmap(lambda row: written(row, calm=False)).map(lambda line: line.encode("utf-8", "replace"))
    )
    calm = st.sampled_from(clean).flatmap(lambda row: written(row, calm=True)).map(str.encode)
    lines = draw(st.lists(calm | calm | broken, min_size=3, max_size=12))
    data = b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n", b"\n \n"]))
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        put = draw(st.sampled_from([b"\xff", b"\xef\xbb\xbf", b"\n", b"\n\n", b"\r", b'"', b"\\", b"}", b"{", b",", b"\x00"]))
        data = data[:at] + put + data[at + draw(st.integers(0, 1)) :]
    return data


def outcome(path: Path, kind: str, keep_rest: bool) -> tuple:
    aside = []
    try:
        table = read_rows(path, kind, set_aside=aside, keep_rest=keep_rest)
    except RowsRefused as refused:
        return refused.problems, refused.total, str(refused), repr(aside)
    return table.to_pylist(), table.schema.to_string(show_schema_metadata=True), repr(aside)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), keep_rest=st.booleans(), least=st.sampled_from([1, 3]))
def test_lines_at_random_are_kept_or_refused_as_they_are_one_by_one(
    kind_and_form, clean_rows, tmp_path, data, keep_rest, least
):
    kind, form = kind_and_form
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data.draw(files(clean_rows(kind, form, 4))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_LEAST_LINES", least)
        patch.setattr(native, "_BLOCK_BYTES", 100)  # so that lines and rows straddle Arrow's blocks
        fast = outcome(path, kind, keep_rest)
        patch.setattr(rows, "native_reader", lambda *_: None)
        assert fast == outcome(path, kind, keep_rest)


def spans(lines: list[str]) -> list[tuple[int, int, bool]]:
    reader = native_reader(KINDS["preference"], "conversational", PAIRS)
    return [(begin, end, table is not None) for begin, end, table in reader.read([line.encode() for line in lines])]


def test_clean_lines_are_read_natively_and_around_one_that_is_not():
    lines = [CLEAN % TURN] * 100
    assert spans(lines) == [(0, 100, True)]
    lines[50] = CLEAN % ""
    assert spans(lines) == [(0, 50, True), (50, 51, False), (51, 100, True)]


@pytest.mark.parametrize(
    "turn",
    [
        '{"role": "assistant", "content": "lost", "content": "6."}',
        r'{"role": "assistant", "content": "lost", "conten\u0074": "6."}',
        r'{"role": "system", "\u0072ole": "assistant", "content": "6."}',
        f'{TURN}], "chosen": [{TURN}',
        f'{TURN}], "cho\\u0073en": [{TURN}',
    ],
)
def test_key_that_stands_twice_is_never_read_natively(turn):
    """pydantic's own reader keeps the last of the two and says nothing, so this is left to Arrow's."""
    assert spans([CLEAN % TURN] * 40 + [CLEAN % turn]) == [(0, 41, False)]


def test_texts_that_look_like_keys_are_read_natively_and_kept(write_rows):
    said = ['"role"', '"role": "user"', '\\"content\\"', '{"prompt": []}', "\\", "\u0000", "é\U0001f600", "\u2028", "\ufeff"]
    given_rows = [{"text": text} for text in said * 5]
    path = write_rows(given_rows)
    reader = native_reader(KINDS["language_modeling"], "standard", pa.schema([("text", pa.string()), ("row", pa.int64())]))
    [(_, _, table)] = reader.read(path.read_bytes().splitlines(keepends=True))
    assert table.to_pylist() == given_rows == read_rows(path, "language_modeling").drop(["row"]).to_pylist()


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"weight": 0.5}, {"weight": 3}),
        ({"weight": 5}, {"weight": 3.0}),
        ({"weight": 5}, {"weight": 2**63}),
        ({"weight": 5}, {"weight": True}),
        ({"weight": True}, {"weight": 1}),
        ({"weight": "a"}, {}),
        ({"weight": "a"}, {"weight": None}),
        ({}, {"weight": "a"}),
    ],
)
def test_extra_column_that_changes_among_many_lines_is_refused_by_line(first, other, write_rows):
    lines = [{"prompt": "Say 6"} | first] * 50 + [{"prompt": "Say 7"} | other] + [{"prompt": "Say 8"} | first] * 50
    with pytest.raises(RowsRefused) as refused:
        read_rows(write_rows(lines), "prompt_only")
    assert [line for line, _ in refused.value.problems] == [51]
