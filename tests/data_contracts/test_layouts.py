"""Conversions rename, and refuse what they cannot say exactly."""

import json
import re

import pytest

from data_contracts.rows import RowsRefused, read_rows


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def turn(speaker: str, value: str) -> dict:
    return {"from": speaker, "value": value}


def read_one(write_rows, row: dict, kind: str, layout: str = "trl") -> dict:
    return read_rows(write_rows([row]), kind, layout=layout).drop(["row"]).to_pylist()[0]


def test_alpaca_with_input_becomes_one_user_turn(write_rows):
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    assert read_one(write_rows, row, "prompt_completion", "alpaca") == {
        "prompt": [message("user", "Translate.\n\nHund")],
        "completion": [message("assistant", "dog")],
    }
    assert read_one(write_rows, row | {"input": ""}, "eval", "alpaca") == {
        "prompt": [message("user", "Translate.")],
        "answer": "dog",
    }


def test_sharegpt_conversation_keeps_every_turn(write_rows):
    row = {"conversations": [turn("human", "2+2?"), turn("gpt", "4")], "system": "Be brief."}
    asked, said = [message("system", "Be brief."), message("user", "2+2?")], [message("assistant", "4")]
    assert read_one(write_rows, row, "language_modeling", "sharegpt") == {"messages": asked + said}
    assert read_one(write_rows, row, "prompt_completion", "sharegpt") == {"prompt": asked, "completion": said}


def test_sharegpt_pair_becomes_an_explicit_preference(write_rows):
    row = {"conversations": [turn("human", "2+2?")], "chosen": turn("gpt", "4"), "rejected": turn("gpt", "5")}
    assert read_one(write_rows, row, "preference", "sharegpt") == {
        "prompt": [message("user", "2+2?")],
        "chosen": [message("assistant", "4")],
        "rejected": [message("assistant", "5")],
    }


@pytest.mark.parametrize(
    ("row", "kind", "layout"),
    [
        ({"conversations": [turn("bard", "2+2?"), turn("gpt", "4")]}, "language_modeling", "sharegpt"),
        ({"conversations": [turn("human", "2+2?") | {"weight": 0}]}, "language_modeling", "sharegpt"),
        ({"conversations": [turn("gpt", "4"), turn("human", "2+2?")]}, "prompt_completion", "sharegpt"),
        ({"conversations": [turn("gpt", "4")]}, "prompt_completion", "sharegpt"),
        ({"instruction": "a", "input": None, "output": "b"}, "prompt_completion", "alpaca"),
        ({"instruction": "a", "output": "b", "history": []}, "prompt_completion", "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", "alpaca"),
        ({"messages": [message("user", "a"), message("assistant", "b")]}, "language_modeling", "sharegpt"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_layout_with_what_it_cannot_say_is_refused(row, kind, layout, write_rows):
    with pytest.raises(RowsRefused) as refused:
        read_one(write_rows, row, kind, layout)
    assert refused.value.problems[0][0] == 1


@pytest.mark.parametrize(("kind", "layout"), [("preference", "alpaca"), ("prompt_only", "alpaca"), ("eval", "sharegpt")])
def test_layout_that_lacks_the_kind_is_a_value_error(kind, layout, write_rows):
    with pytest.raises(ValueError, match=f"{layout}.*{kind}"):
        read_one(write_rows, {}, kind, layout)


U1, U2 = message("user", "q1"), message("user", "q2")
A1, A2, B2 = message("assistant", "a1"), message("assistant", "a2"), message("assistant", "b2")


@pytest.mark.parametrize(
    ("chosen", "rejected", "num_shared"),
    [
        ([U1, A1], [U1, A2], 1),
        ([U1, A1, U2, A2], [U1, A1, U2, B2], 3),
        ([U1, A1], [U1, A1], 1),  # a tie keeps its reply, or it would have none
        ([U1, A1, U2, A2], [U1, A1], 1),  # one side goes on where the other ends: its end is still its reply
        ([U1, A1, U2, A2], [U1, A2, U2, A2], 1),  # what is equal again later is no prefix
    ],
)
def test_implicit_prompt_is_what_both_sides_begin_with(chosen, rejected, num_shared, write_rows):
    row = read_one(write_rows, {"chosen": chosen, "rejected": rejected}, "preference")
    assert row == {"prompt": chosen[:num_shared], "chosen": chosen[num_shared:], "rejected": rejected[num_shared:]}


@pytest.mark.parametrize(("chosen", "rejected"), [([U1, A1], [U2, A1]), ([A1], [B2]), ("q a1", "q b2")])
def test_implicit_prompt_that_is_not_there_is_refused(chosen, rejected, write_rows):
    with pytest.raises(RowsRefused):
        read_one(write_rows, {"chosen": chosen, "rejected": rejected}, "preference")


# What `ChatCompletionMessage.model_dump()` of OpenAI's SDK leaves beside role and content, and what servers like it add.
_SDK_EMPTY = {
    **dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "name", "weight", "reasoning_content")),
    "annotations": [],
}


@pytest.mark.parametrize(
    ("kind", "form"),
    [("language_modeling", "conversational"), ("preference", "conversational"), ("unpaired_preference", "conversational")],
)
def test_keys_of_the_sdk_that_hold_nothing_make_no_difference(kind, form, write_rows, clean_rows):
    rows = clean_rows(kind, form, 40)
    dumped = [
        {name: [turn | _SDK_EMPTY for turn in value] if isinstance(value, list) else value for name, value in row.items()}
        for row in rows
    ]
    assert read_rows(write_rows(dumped, "dumped.jsonl"), kind).equals(read_rows(write_rows(rows), kind))
    mixed = [one if n % 2 else other for n, (one, other) in enumerate(zip(dumped, rows, strict=True))]
    assert read_rows(write_rows(mixed, "mixed.jsonl"), kind).equals(read_rows(write_rows(rows), kind))


def test_empty_calls_of_a_conversation_with_tools_make_no_difference(write_rows):
    turns = [{"role": "user", "content": "Say 6"}, {"role": "assistant", "content": "6."}]
    rows = [{"messages": turns, "tools": []}]
    dumped = [{"messages": [turn | _SDK_EMPTY | {"tool_calls": []} for turn in turns], "tools": []}]
    kind = "language_modeling"
    assert read_rows(write_rows(dumped, "dumped.jsonl"), kind).equals(read_rows(write_rows(rows), kind))


@pytest.mark.parametrize(("key", "value"), [("refusal", "No."), ("audio", {"id": "a"}), ("annotations", [{}]), ("weight", 0)])
def test_keys_of_the_sdk_that_hold_something_are_refused(key, value, write_rows):
    turns = [{"role": "user", "content": "Say 6"}, {"role": "assistant", "content": "6.", key: value}]
    with pytest.raises(RowsRefused, match=rf"messages\[1\].{key} "):
        read_rows(write_rows([{"messages": turns}]), "language_modeling")


@pytest.mark.parametrize(("key", "value"), [("name", "Ann"), ("weight", 1)])
def test_refusal_of_a_name_or_weight_gives_a_conversion_whose_rows_are_read(key, value, write_rows, clean_rows):
    rows = clean_rows("preference", "conversational", 3)
    named = [row | {"chosen": [turn | {key: value} for turn in row["chosen"]]} for row in rows]
    with pytest.raises(RowsRefused) as refused:
        read_rows(write_rows(named), "preference")
    converted = eval(re.search(r"dataset\.map\((.*)\)$", refused.value.problems[0][1])[1])
    assert [row | converted(row) for row in named] == rows
