"""Conversions rename, and refuse what they cannot say exactly."""

import json

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
