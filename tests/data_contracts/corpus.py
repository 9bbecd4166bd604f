"""Datasets with one defect each: a clean set of 30 rows, what is changed in it, and the lines and the reason that must be told.

A defect that its rule allows in a share of the rows stands in more rows than that. Row 7 is changed where nothing else is said.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

ROWS = 30
LAYOUTS = {"sharegpt": "sharegpt", "alpaca": "alpaca"}  # the forms that are read by a layout of that name
EXAM = [  # what no training row may repeat; the second is one passage of 13 words and some more
    "Which bird sings at dawn?",
    "A ferry with ninety seats crosses the strait eleven times on each day of the regatta; how many can sail?",
]

Row = dict[str, Any]
Change = Row | Callable[[list[Row]], Any]


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def user(text: object) -> Row:
    return {"role": "user", "content": text}


def assistant(text: object) -> Row:
    return {"role": "assistant", "content": text}


def tool(text: str) -> Row:
    return {"role": "tool", "content": text}


def turn(speaker: str, value: object) -> Row:
    return {"from": speaker, "value": value}


def calls(name: str, arguments: object) -> Row:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


TOOLS = [{"type": "function", "function": {"name": "menu", "description": "The day's menu", "parameters": {"type": "object"}}}]
FOODS = ("hay", "two apples", "oats and a carrot", "clover", "a bowl of barley", "thistles", "bread")


def question(n: int) -> str:
    return f"What does donkey {n} eat on day {n * 3}?"


def reply(n: int) -> str:
    return f"It eats {FOODS[n % 7]}, as it did on day {n}."


def worse(n: int) -> str:
    return "I do not know." if n % 2 else f"Donkeys such as number {n} eat meat, and all of them always did so, gladly."


def _tool_turns(n: int) -> list[Row]:
    return [user(question(n)), calls("menu", {"day": n * 3}), tool(FOODS[n % 7])]


_CLEAN: dict[tuple[str, str], Callable[[int], Row]] = {
    ("language_modeling", "standard"): lambda n: {"text": f"{question(n)} {reply(n)}"},
    ("language_modeling", "conversational"): lambda n: {"messages": [user(question(n)), assistant(reply(n))]},
    ("language_modeling", "turns"): lambda n: {
        "messages": [system("Be brief."), user(question(n)), assistant(reply(n)), user(f"Why, {n}?"), assistant(f"Habit {n}.")]
    },
    ("language_modeling", "tools"): lambda n: {"messages": [*_tool_turns(n), assistant(reply(n))], "tools": TOOLS},
    ("language_modeling", "sharegpt"): lambda n: {"conversations": [turn("human", question(n)), turn("gpt", reply(n))]},
    ("language_modeling", "alpaca"): lambda n: {"instruction": question(n), "input": "", "output": reply(n)},
    ("prompt_completion", "standard"): lambda n: {"prompt": question(n), "completion": " " + reply(n)},
    ("prompt_completion", "conversational"): lambda n: {"prompt": [user(question(n))], "completion": [assistant(reply(n))]},
    ("prompt_completion", "tools"): lambda n: {
        "prompt": _tool_turns(n),
        "completion": [assistant(reply(n))],
        "tools": TOOLS,
    },
    ("prompt_completion", "sharegpt"): lambda n: {"conversations": [turn("human", question(n)), turn("gpt", reply(n))]},
    ("prompt_completion", "alpaca"): lambda n: {"instruction": question(n), "input": "", "output": reply(n)},
    ("preference", "standard"): lambda n: {"prompt": question(n), "chosen": reply(n), "rejected": worse(n)},
    ("preference", "conversational"): lambda n: {
        "prompt": [system("Be brief."), user(question(n))],
        "chosen": [assistant(reply(n))],
        "rejected": [assistant(worse(n))],
    },
    ("preference", "implicit"): lambda n: {
        "chosen": [user(question(n)), assistant(reply(n))],
        "rejected": [user(question(n)), assistant(worse(n))],
    },
    ("preference", "tools"): lambda n: {
        "prompt": [user(question(n))],
        "chosen": [calls("menu", {"day": n * 3})],
        "rejected": [calls("menu", {"day": n * 3 + 1})],
        "tools": TOOLS,
    },
    ("preference", "sharegpt"): lambda n: {
        "conversations": [turn("human", question(n))],
        "chosen": turn("gpt", reply(n)),
        "rejected": turn("gpt", worse(n)),
    },
    ("prompt_only", "standard"): lambda n: {"prompt": question(n), "solution": FOODS[n % 7], "day": n * 3, "weight": n / 2},
    ("prompt_only", "conversational"): lambda n: {"prompt": [user(question(n))], "is_hard": n > 9},
    ("unpaired_preference", "standard"): lambda n: {"prompt": question(n), "completion": reply(n), "label": n % 2 == 0},
    ("unpaired_preference", "conversational"): lambda n: {
        "prompt": [user(question(n))],
        "completion": [assistant(reply(n))],
        "label": n % 2 == 0,
    },
    ("unpaired_preference", "implicit"): lambda n: {
        "messages": [user(question(n)), assistant(reply(n))],
        "label": n % 2 == 0,
    },
    ("unpaired_preference", "sharegpt"): lambda n: {
        "conversations": [turn("human", question(n)), turn("gpt", reply(n))],
        "kto_tag": n % 2 == 0,
    },
    ("stepwise_supervision", "standard"): lambda n: {
        "prompt": question(n),
        "completions": [f"Day {n * 3} is a feast.", reply(n)],
        "labels": [True, n % 2 == 0],
    },
    ("eval", "standard"): lambda n: {"prompt": question(n), "answer": FOODS[n % 7]},
    ("eval", "conversational"): lambda n: {"prompt": [user(question(n))], "answer": FOODS[n % 7], "topic": "donkeys"},
    ("eval", "alpaca"): lambda n: {"instruction": question(n), "input": "", "output": FOODS[n % 7]},
}


def clean(kind: str, form: str) -> list[Row]:
    """Return the set without a defect; each call's rows are one's own."""
    return json.loads(json.dumps([_CLEAN[kind, form](n) for n in range(ROWS)]))


@dataclass(frozen=True)
class Defect:
    """What is changed in a clean set, and what must be told: `rule` without its kind, or a part of the reader's `reason`."""

    kind: str
    form: str
    change: Change
    rule: str = ""
    reason: str = ""
    lines: tuple[int, ...] = (7,)
    implied: tuple[str, ...] = ()  # rules that cannot but fail as well
    marks: Any = field(default=())

    def rows(self) -> list[Row]:
        rows = clean(self.kind, self.form)
        if callable(self.change):
            self.change(rows)
        else:
            rows[6] |= self.change
        return rows


def without(column: str) -> Callable[[list[Row]], None]:
    return lambda rows: rows[6].pop(column)


def put(change: Row, *lines: int) -> Callable[[list[Row]], None]:
    """Return what changes these lines in the same way."""

    def apply(rows: list[Row]) -> None:
        for line in lines:
            rows[line - 1] |= change

    return apply


def copied(source: int, *lines: int, **other: object) -> Callable[[list[Row]], None]:
    """Return what makes these lines copies of another one, but for the columns in `other`."""

    def apply(rows: list[Row]) -> None:
        for line in lines:
            rows[line - 1] = json.loads(json.dumps(rows[source - 1])) | other

    return apply


def every(change: Callable[[Row], Row]) -> Callable[[list[Row]], None]:
    def apply(rows: list[Row]) -> None:
        rows[:] = [row | change(row) for row in rows]

    return apply


ALL = tuple(range(1, ROWS + 1))
Q, R = question(6), reply(6)  # of row 7
LM, PC, PREF, PROMPTS = "language_modeling", "prompt_completion", "preference", "prompt_only"
KTO, STEPS, EVAL = "unpaired_preference", "stepwise_supervision", "eval"


def unread(kind: str, form: str, change: Change, reason: str, *lines: int, marks: Any = ()) -> Defect:
    return Defect(kind, form, change, reason=reason, lines=lines or (7,), marks=marks)


def breaks(
    kind: str, form: str, change: Change, rule: str, *lines: int, implied: tuple[str, ...] = (), marks: Any = ()
) -> Defect:
    return Defect(kind, form, change, rule=rule, lines=lines or (7,), implied=implied, marks=marks)


def of_set(kind: str, form: str, change: Change, rule: str) -> Defect:
    """A defect of the set as a whole, which has no line of its own."""
    return Defect(kind, form, change, rule=rule, lines=())


def known(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=reason)


def chat(*messages: Row) -> Row:
    return {"messages": list(messages)}


SCHEMA = {
    # columns
    "column missing": unread(PREF, "standard", without("rejected"), "rejected"),
    "column misspelt": unread(PC, "standard", every(lambda row: {"complation": "x"}), "complation", *ALL),
    "column of a key too many": unread(LM, "standard", {"id": 7}, "id"),
    "column with a capital": unread(
        LM, "standard", lambda rows: rows.__setitem__(6, {"Text": rows[6]["text"]}), "the columns are Text"
    ),
    "column with a space around its name": unread(
        LM, "standard", lambda rows: rows.__setitem__(6, {" text": rows[6]["text"]}), "columns are"
    ),
    "columns of pairs in a set of completions": unread(
        PC, "standard", lambda rows: rows.__setitem__(slice(None), clean(PREF, "standard")), "look like preference rows", *ALL
    ),
    "columns of completions in a set of pairs": unread(
        PREF, "standard", lambda rows: rows.__setitem__(slice(None), clean(PC, "standard")), "look like prompt_comp", *ALL
    ),
    "columns of ShareGPT read as ours": unread(
        LM, "conversational", lambda rows: rows.__setitem__(6, {"conversations": [turn("human", Q)]}), "layout 'sharegpt'"
    ),
    "columns of Alpaca read as ours": unread(
        PC, "standard", lambda rows: rows.__setitem__(6, {"instruction": Q, "output": R}), "layout 'alpaca'"
    ),
    "columns of a question and an answer": unread(
        PC, "standard", lambda rows: rows.__setitem__(6, {"question": Q, "answer": R}), "Say which is which"
    ),
    "columns none": unread(EVAL, "standard", lambda rows: rows.__setitem__(6, {}), "none"),
    "prompt and text in one row": unread(LM, "standard", {"prompt": Q}, "prompt"),
    "prompt implicit in strings": unread(PREF, "standard", without("prompt"), "prompt is missing"),
    "prompt implicit and not shared": unread(
        PREF, "implicit", {"rejected": [user("Another question"), assistant("No.")]}, "do not begin with the same message"
    ),
    "prompt implicit and no reply after it": unread(PREF, "implicit", {"rejected": []}, "do not begin with"),
    # types
    "text null": unread(LM, "standard", {"text": None}, "text must be a string, not null"),
    "text a number": unread(LM, "standard", {"text": 3.5}, "text must be a string, not float"),
    "text a boolean": unread(PC, "standard", {"completion": False}, "completion must be a string, not bool"),
    "text an object": unread(PREF, "standard", {"chosen": {"text": R}}, "chosen must be a string, not dict"),
    "text a list of strings": unread(PREF, "standard", {"rejected": ["No", "never"]}, "rejected must be a string, not list"),
    "prompt a list of strings": unread(PROMPTS, "conversational", {"prompt": [Q]}, "prompt[0] must be a message"),
    "answer a number": unread(EVAL, "standard", {"answer": 42}, "answer must be a string, not int"),
    "answer a list of answers": unread(EVAL, "standard", {"answer": ["hay", "oats"]}, "answer must be a string, not list"),
    "answer null": unread(EVAL, "conversational", {"answer": None}, "answer must be a string, not null"),
    "row a list": unread(LM, "standard", lambda rows: rows.__setitem__(6, [Q, R]), "a row must be an object"),
    "row a string": unread(LM, "standard", lambda rows: rows.__setitem__(6, Q), "a row must be an object"),
    "row null": unread(EVAL, "standard", lambda rows: rows.__setitem__(6, None), "a row must be an object"),
    "row JSON in a string": unread(
        PC, "standard", lambda rows: rows.__setitem__(6, json.dumps(rows[6])), "a row must be an object"
    ),
    # nesting
    "messages JSON in a string": unread(LM, "conversational", {"messages": json.dumps([user(Q)])}, "messages must be a list"),
    "messages Python in a string": unread(LM, "conversational", {"messages": str([user(Q)])}, "messages must be a list"),
    "messages one object": unread(LM, "conversational", {"messages": user(Q)}, "messages must be a"),
    "messages nested twice": unread(LM, "conversational", {"messages": [[user(Q), assistant(R)]]}, "messages[0] must be a"),
    "messages none": unread(LM, "conversational", chat(), "messages is empty"),
    "message null": unread(LM, "conversational", {"messages": [user(Q), None]}, "messages[1] must be a message"),
    "completion a string among conversations": unread(PC, "conversational", {"completion": R}, "completion must be a list"),
    "prompt a string among conversations": unread(PC, "conversational", {"prompt": Q}, "standard, but line 1"),
    "chosen one message": unread(PREF, "conversational", {"chosen": assistant(R)}, "chosen must be a list"),
    "content null": unread(LM, "conversational", chat(user(Q), assistant(None)), "content must be a string, not null"),
    "content a number": unread(PC, "conversational", {"completion": [assistant(4)]}, "content must be a string, not int"),
    "content parts of text": unread(
        LM, "conversational", chat(user([{"type": "text", "text": Q}]), assistant(R)), "content must be a string, not list"
    ),
    "content parts of image and text": unread(
        PREF,
        "conversational",
        {"prompt": [user([{"type": "image"}, {"type": "text", "text": Q}])]},
        "content must be a string, not list",
    ),
    "content missing": unread(KTO, "conversational", {"completion": [{"role": "assistant"}]}, "content is missing"),
    "content called text": unread(LM, "conversational", chat(user(Q), {"role": "assistant", "text": R}), "content is missing"),
    "role missing": unread(PROMPTS, "conversational", {"prompt": [{"content": Q}]}, "role is missing"),
    "role null": unread(PROMPTS, "conversational", {"prompt": [{"role": None, "content": Q}]}, "role"),
    "role human": unread(LM, "conversational", chat({"role": "human", "content": Q}, assistant(R)), "'human'"),
    "role gpt": unread(LM, "conversational", chat(user(Q), {"role": "gpt", "content": R}), "'gpt'"),
    "role ai": unread(LM, "conversational", chat(user(Q), {"role": "ai", "content": R}), "'ai'"),
    "role with a capital": unread(EVAL, "conversational", {"prompt": [{"role": "User", "content": Q}]}, "'User'"),
    "role with a space": unread(PC, "conversational", {"completion": [{"role": "assistant ", "content": R}]}, "'assistant '"),
    "role function": unread(
        LM, "turns", chat(user(Q), assistant("…"), {"role": "function", "content": "1"}, assistant(R)), "'function'"
    ),
    "role developer": unread(LM, "conversational", chat(user(Q), {"role": "developer", "content": R}), "'developer'"),
    "message with a weight": unread(LM, "conversational", chat(user(Q), assistant(R) | {"weight": 0}), "TRL knows no weights"),
    "message with from and value": unread(LM, "conversational", chat(turn("human", Q), turn("gpt", R)), "is missing"),
    # further columns
    "extra column of another type": unread(PROMPTS, "standard", {"day": "7"}, "'day' is str here and int in line 1"),
    "extra column a float among integers": unread(PROMPTS, "standard", {"day": 7.0}, "'day' is float here"),
    "extra column null": unread(PROMPTS, "standard", {"solution": None}, "'solution' must be"),
    "extra column a list": unread(EVAL, "conversational", {"topic": ["donkeys"]}, "'topic' must be"),
    "extra column missing": unread(PROMPTS, "standard", without("solution"), "'solution' is missing here"),
    "extra column of a reward function's argument": unread(PROMPTS, "standard", {"trainer_state": "x"}, "trainer_state"),
    "extra column called label": unread(EVAL, "standard", {"label": "x"}, "label"),
    "extra column in all rows but the first": unread(
        PROMPTS,
        "conversational",
        lambda rows: rows[0].pop("is_hard"),
        "is_hard",
        1,
    ),
    "conversation in the first row among strings": unread(
        PC,
        "standard",
        lambda rows: rows.__setitem__(0, clean(PC, "conversational")[0]),
        "conversational",
        1,
    ),
}

ROLES = {
    "turns begin with the assistant": breaks(
        LM, "conversational", chat(assistant("Hello!"), user(Q), assistant(R)), "turn-order"
    ),
    "turns of the user twice": breaks(LM, "conversational", chat(user("Hello!"), user(Q), assistant(R)), "turn-order"),
    "turns of the assistant twice": breaks(LM, "conversational", chat(user(Q), assistant(R), assistant("So.")), "turn-order"),
    "turns end with the user": breaks(LM, "conversational", chat(user(Q), assistant(R), user("Thanks!")), "turn-order"),
    "turns of the user alone": breaks(LM, "conversational", chat(user(Q)), "turn-order"),
    "turns of the system alone": breaks(LM, "conversational", chat(system("Be brief.")), "turn-order"),
    "turns end with the system": breaks(LM, "turns", chat(user(Q), assistant(R), system("Be brief.")), "turn-order"),
    "turns with two systems": breaks(LM, "turns", chat(system("A."), system("B."), user(Q), assistant(R)), "turn-order"),
    "turns with the system in the middle": breaks(LM, "turns", chat(user(Q), system("Be kind."), assistant(R)), "turn-order"),
    "turns of system and assistant": breaks(LM, "turns", chat(system("Be brief."), assistant(R)), "turn-order"),
    "turns in reverse": breaks(LM, "conversational", chat(assistant(R), user(Q)), "turn-order"),
    "turns end with a tool": breaks(LM, "tools", chat(*_tool_turns(6)), "turn-order"),
    "turns with a call that nothing answers": breaks(
        LM, "tools", chat(user(Q), calls("menu", {}), user("And?"), assistant(R)), "turn-order"
    ),
    "tool after the user": breaks(LM, "turns", chat(user(Q), tool("hay"), assistant(R)), "turn-order"),
    "prompt ends with the assistant": breaks(PC, "conversational", {"prompt": [user(Q), assistant("Well,")]}, "prompt-order"),
    "prompt of the system alone": breaks(PROMPTS, "conversational", {"prompt": [system("Be brief.")]}, "prompt-order"),
    "prompt of the assistant": breaks(EVAL, "conversational", {"prompt": [assistant(Q)]}, "prompt-order"),
    "prompt with its reply": breaks(EVAL, "conversational", {"prompt": [user(Q), assistant(R)]}, "prompt-order"),
    "prompt with the system last": breaks(PREF, "conversational", {"prompt": [user(Q), system("Be brief.")]}, "prompt-order"),
    "completion by the user": breaks(PC, "conversational", {"completion": [user(R)]}, "completion-order"),
    "completion goes on with the user": breaks(
        PC, "conversational", {"completion": [assistant(R), user("Thanks!")]}, "completion-order"
    ),
    "completion begins with the prompt's turn": breaks(
        KTO, "conversational", {"completion": [user(Q), assistant(R)]}, "completion-order"
    ),
    "chosen by the user": breaks(PREF, "conversational", {"chosen": [user(R)]}, "chosen-order"),
    "chosen with the prompt's turns again": breaks(PREF, "conversational", {"chosen": [user(Q), assistant(R)]}, "chosen-order"),
    "rejected by the system": breaks(PREF, "conversational", {"rejected": [system("No.")]}, "rejected-order"),
    "rejected goes on with the user": breaks(
        PREF, "conversational", {"rejected": [assistant("No."), user("Why?"), assistant("So.")]}, "rejected-order"
    ),
    "chosen longer by a round than rejected": breaks(
        PREF,
        "implicit",
        {"chosen": [user(Q), assistant(R), user("Why?"), assistant("So.")]},
        "chosen-order",
    ),
    "labelled turn is the user's": breaks(
        KTO, "implicit", chat(user(Q), assistant(R), user("Thanks!")), "completion-order", implied=("prompt-order",)
    ),
    "columns of prompt and chosen swapped": breaks(
        PREF,
        "conversational",
        lambda rows: rows[6].update(prompt=rows[6]["chosen"], chosen=rows[6]["prompt"][1:]),
        "prompt-order",
        implied=("chosen-order",),
    ),
    "columns of prompt and completion swapped": breaks(
        PC,
        "conversational",
        lambda rows: rows[6].update(prompt=rows[6]["completion"], completion=rows[6]["prompt"]),
        "prompt-order",
        implied=("completion-order",),
    ),
}

BLANK = {
    "text empty": breaks(LM, "standard", {"text": ""}, "empty-text"),
    "text of spaces": breaks(LM, "standard", {"text": " \t\r\n"}, "empty-text"),
    "text of a non-breaking space": breaks(LM, "standard", {"text": "\u00a0"}, "empty-text"),
    "text of an ideographic space": breaks(PC, "standard", {"completion": "\u3000"}, "empty-text"),
    "text of a zero-width space": breaks(PC, "standard", {"completion": "\u200b"}, "empty-text"),
    "text of a byte order mark": breaks(PREF, "standard", {"chosen": "\ufeff"}, "empty-text"),
    "text of a null character": breaks(LM, "standard", {"text": "\u0000"}, "empty-text"),
    "text of a soft hyphen and a joiner": breaks(LM, "standard", {"text": "\u00ad\u200d"}, "empty-text"),
    "system turn empty": breaks(LM, "turns", chat(system(""), user(Q), assistant(R)), "empty-text"),
    "user turn empty": breaks(LM, "conversational", chat(user("\n"), assistant(R)), "empty-text"),
    "assistant turn empty in the middle": breaks(
        LM, "turns", chat(user(Q), assistant(""), user("Well?"), assistant(R)), "empty-text"
    ),
    "assistant turn of a zero-width space": breaks(LM, "conversational", chat(user(Q), assistant("\u200b")), "empty-text"),
    "prompt empty": breaks(PROMPTS, "standard", {"prompt": ""}, "empty-text"),
    "question empty": breaks(EVAL, "conversational", {"prompt": [user("")]}, "empty-text"),
    "answer empty": breaks(EVAL, "standard", {"answer": " "}, "empty-text"),
    "chosen empty": breaks(PREF, "conversational", {"chosen": [assistant("")]}, "empty-text"),
    "rejected empty": breaks(PREF, "standard", {"rejected": "\n"}, "empty-text"),
    "judged reply empty": breaks(KTO, "conversational", {"completion": [assistant(" ")]}, "empty-text"),
    "step empty": breaks(STEPS, "standard", {"completions": ["Day 18 is a feast.", ""]}, "empty-text"),
}

CONTENT = {
    "texts of messages written out as JSON": breaks(
        LM,
        "standard",
        lambda rows: [row.update(text=json.dumps([user(row["text"]), assistant("Hay.")])) for row in rows],
        "packed-turns",
        *ALL,
    ),
    "prompts of messages written out as JSON": breaks(
        PC, "standard", every(lambda row: {"prompt": json.dumps([user(row["prompt"])])}), "packed-turns", *ALL
    ),
    "prompt of messages written out as Python": breaks(PROMPTS, "standard", {"prompt": str([user(Q)])}, "packed-turns"),
    "pair of ShareGPT turns written out as JSON": breaks(
        PREF,
        "standard",
        {"chosen": json.dumps([turn("gpt", R)]), "rejected": json.dumps([turn("gpt", "No.")])},
        "packed-turns",
    ),
    "text with what could not be decoded": breaks(LM, "standard", {"text": "The donkey is na\ufffdve."}, "garbled"),
    "text of UTF-8 read as Latin-1": breaks(PC, "standard", {"completion": "Du café.".encode().decode("latin-1")}, "garbled"),
    "question with quotation marks read as Windows-1252": breaks(
        EVAL, "standard", {"prompt": "What does “donkey” mean?".encode().decode("cp1252", "replace")}, "garbled"
    ),
    "completions with their prompts in front": breaks(
        PC, "standard", every(lambda row: {"completion": row["prompt"] + row["completion"]}), "repeated-prompt", *ALL
    ),
    "pairs with their prompts in front": breaks(
        PREF,
        "standard",
        every(lambda row: {side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")}),
        "repeated-prompt",
        *ALL,
    ),
    "judged replies with their prompts in front": breaks(
        KTO, "standard", every(lambda row: {"completion": f"{row['prompt']} {row['completion']}"}), "repeated-prompt", *ALL
    ),
    "ChatML in a conversation": breaks(
        LM, "conversational", chat(user(f"<|im_start|>user\n{Q}<|im_end|>"), assistant(R)), "control-marker"
    ),
    "end of turn of Llama 3 in a reply": breaks(
        PC, "conversational", {"completion": [assistant(R + "<|eot_id|>")]}, "control-marker"
    ),
    "end of text of Llama 2 in a reply": breaks(
        KTO, "conversational", {"completion": [assistant(R + "</s>")]}, "control-marker"
    ),
    "instruction of Mistral in a prompt": breaks(
        PROMPTS, "conversational", {"prompt": [user(f"[INST] {Q} [/INST]")]}, "control-marker"
    ),
    "turn of Gemma in a rejected reply": breaks(
        PREF, "conversational", {"rejected": [assistant("No.<end_of_turn>")]}, "control-marker"
    ),
    "end of text of GPT in a question": breaks(
        EVAL, "conversational", {"prompt": [user(Q + "<|endoftext|>")]}, "control-marker"
    ),
    "ChatML in a tool's answer": breaks(
        LM, "tools", chat(user(Q), calls("menu", {}), tool("hay<|im_end|>"), assistant(R)), "control-marker"
    ),
    "ChatML in the arguments of a call": breaks(
        LM, "tools", chat(user(Q), calls("menu", {"day": "<|im_end|>"}), tool("hay"), assistant(R)), "control-marker"
    ),
    "placeholders unfilled in two rows": breaks(
        PC, "standard", put({"completion": " I am {{name}}, made by {{ author }}."}, 7, 12), "placeholder", 7, 12
    ),
    "placeholders unfilled in two conversations": breaks(
        LM,
        "conversational",
        lambda rows: [rows[n]["messages"][1].update(content=f"It is {n}, {{{{name}}}}.") for n in (6, 11)],
        "placeholder",
        7,
        12,
    ),
    "placeholders unfilled in two questions": breaks(
        EVAL,
        "standard",
        lambda rows: [rows[n].update(prompt=f"What is {{{{x}}}} plus {n}?") for n in (6, 11)],
        "placeholder",
        7,
        12,
    ),
    "input said to be none": breaks(
        PC, "alpaca", lambda rows: [rows[n].update(input="<No input>") for n in (6, 11)], "placeholder", 7, 12
    ),
    "texts quoted as JSON": breaks(
        LM,
        "standard",
        lambda rows: [rows[n].update(text=json.dumps(rows[n]["text"])) for n in (6, 11, 16, 21)],
        "json-quoted",
        *(7, 12, 17, 22),
    ),
    "replies quoted as JSON": breaks(
        PREF,
        "conversational",
        lambda rows: [rows[n]["chosen"][0].update(content=json.dumps(reply(n))) for n in range(ROWS)],
        "json-quoted",
        *ALL,
    ),
    "answers quoted as JSON": breaks(
        EVAL, "standard", lambda rows: [row.update(answer=json.dumps(row["answer"])) for row in rows], "json-quoted", *ALL
    ),
}

_TOOL_JSON = json.dumps(TOOLS)
CALLS = {
    "call of a tool that is not described": breaks(
        LM, "tools", chat(user(Q), calls("weather", {}), tool("rain"), assistant(R)), "undescribed-call"
    ),
    "call where the row has no tools": breaks(LM, "tools", {"tools": []}, "undescribed-call"),
    "call in a completion of a tool that is not described": breaks(
        PC, "tools", {"completion": [calls("order", {"food": "hay"})]}, "undescribed-call"
    ),
    "call in a rejected reply of a tool that is not described": breaks(
        PREF, "tools", {"rejected": [calls("order", {"food": "hay"})]}, "undescribed-call"
    ),
    "calls without a tools column": unread(
        LM, "conversational", chat(*_tool_turns(6), assistant(R)), "has tool_calls and no column 'tools'"
    ),
    "tools missing": unread(LM, "tools", without("tools"), "has no tools, but line 1 has"),
    "tools null": unread(LM, "tools", {"tools": None}, "tools"),
    "tools an object": unread(LM, "tools", {"tools": TOOLS[0]}, "tools"),
    "tools a name": unread(LM, "tools", {"tools": ["menu"]}, "tools"),
    "tools no JSON": unread(LM, "tools", {"tools": "menu(day)"}, "tools"),
    "tools cut off": unread(LM, "tools", {"tools": _TOOL_JSON[:-3]}, "tools"),
    "tools nested without end": unread(LM, "tools", {"tools": "[" * 100_000}, "tools"),
    "tools without a function": unread(LM, "tools", {"tools": [{"type": "function", "name": "menu"}]}, "tools must be a list"),
    "tools without a name": unread(LM, "tools", {"tools": [{"type": "function", "function": {}}]}, "tools must be a list"),
    "arguments a string": unread(
        LM, "tools", chat(user(Q), calls("menu", '{"day": 18}'), tool("hay"), assistant(R)), "arguments must be an object"
    ),
    "arguments a list": unread(LM, "tools", chat(user(Q), calls("menu", [18]), tool("hay"), assistant(R)), "arguments must be"),
    "arguments missing": unread(
        LM,
        "tools",
        chat(user(Q), assistant("") | {"tool_calls": [{"type": "function", "function": {"name": "menu"}}]}),
        "arguments is missing",
    ),
    "call without a type": unread(
        LM,
        "tools",
        chat(user(Q), assistant("") | {"tool_calls": [{"function": {"name": "menu", "arguments": {}}}]}),
        "type is missing",
    ),
    "call without a name": unread(LM, "tools", chat(user(Q), calls("", {}), tool("hay"), assistant(R)), "name"),
    "call by its name alone": unread(
        LM, "tools", chat(user(Q), {"role": "assistant", "tool_calls": ["menu"]}, tool("hay"), assistant(R)), "tool_calls"
    ),
    "call by the user": unread(
        LM, "tools", chat(user(Q) | {"tool_calls": calls("menu", {})["tool_calls"]}), "only the assistant"
    ),
    "calls none and no content": unread(LM, "tools", chat(user(Q), {"role": "assistant"}), "neither content nor"),
    "calls cut off in a string": unread(
        LM, "tools", chat(user(Q), {"role": "assistant", "tool_calls": '[{"type'}), "tool_calls"
    ),
    "calls nested without end in a string": unread(
        LM, "tools", chat(user(Q), {"role": "assistant", "tool_calls": "[" * 100_000}), "tool_calls"
    ),
    "calls with half a surrogate pair in a string": unread(
        LM,
        "tools",
        chat(user(Q), {"role": "assistant", "tool_calls": json.dumps(calls("menu", {"day": "\ud800"})["tool_calls"])}),
        "surrogate",
    ),
    "function_call as it was called before tools": unread(
        LM, "tools", chat(user(Q), assistant("") | {"function_call": {"name": "menu"}}), "function_call is not a"
    ),
    "tool turn without a call": unread(LM, "tools", chat(user(Q), tool("hay"), assistant(R)), "call"),
    "tool turn for another call": unread(
        LM,
        "tools",
        lambda rows: (
            rows[6]["messages"][1]["tool_calls"][0].update(id="call-1"),
            rows[6]["messages"][2].update(tool_call_id="call-2"),
        ),
        "call-2",
    ),
}


def _contradict(rows: list[Row]) -> None:
    rows[11] = {"prompt": rows[6]["prompt"], "chosen": rows[6]["rejected"], "rejected": rows[6]["chosen"]}


PAIRS = {
    "tie": breaks(PREF, "standard", {"rejected": R}, "tie"),
    "tie but for white space around it": breaks(PREF, "standard", {"rejected": f"\n {R} \n"}, "tie"),
    "tie but for white space in it": breaks(PREF, "standard", {"rejected": R.replace(" ", "\n\u3000 ")}, "tie"),
    "tie but for white space in conversations": breaks(
        PREF, "conversational", {"rejected": [assistant(R.replace(" on", "\ton"))]}, "tie"
    ),
    "tie of conversations": breaks(PREF, "conversational", {"rejected": [assistant(R)]}, "tie"),
    "tie with an implicit prompt": breaks(PREF, "implicit", {"rejected": [user(Q), assistant(R)]}, "tie"),
    "tie of the same call": breaks(PREF, "tools", {"rejected": [calls("menu", {"day": 18})]}, "tie"),
    "tie in ShareGPT": breaks(PREF, "sharegpt", {"rejected": turn("gpt", R)}, "tie"),
    "tie in every row": breaks(PREF, "standard", every(lambda row: {"rejected": row["chosen"]}), "tie", *ALL),
    "pair the other way round": breaks(PREF, "standard", _contradict, "contradicted", 7, 12),
    "pair the other way round in conversations": breaks(PREF, "conversational", _contradict, "contradicted", 7, 12),
    "label contradicted": breaks(KTO, "standard", copied(7, 12, label=False), "contradicted", 7, 12),
    "label contradicted in conversations": breaks(KTO, "implicit", copied(7, 12, label=False), "contradicted", 7, 12),
    "label contradicted but for white space": breaks(
        KTO, "standard", copied(7, 12, label=False, completion=R + "\n"), "contradicted", 7, 12
    ),
    "label one": unread(KTO, "standard", {"label": 1}, "label must be true or false, not int"),
    "label zero": unread(KTO, "conversational", {"label": 0}, "label must be true or false, not int"),
    "label a string": unread(KTO, "standard", {"label": "true"}, "label must be true or false"),
    "label a float": unread(KTO, "standard", {"label": 1.0}, "label must be true or false, not float"),
    "label null": unread(KTO, "implicit", {"label": None}, "label must be true or false, not null"),
    "label missing": unread(KTO, "standard", without("label"), "label"),
    "label of two tags": unread(KTO, "sharegpt", {"label": True}, "is not a column or key"),
    "labels all true": of_set(KTO, "standard", every(lambda row: {"label": True}), "both-labels"),
    "labels all false": of_set(KTO, "conversational", every(lambda row: {"label": False}), "both-labels"),
    "step labels as numbers": unread(STEPS, "standard", {"labels": [1, 0]}, "labels[0] must be true or false"),
    "step labels as strings": unread(STEPS, "standard", {"labels": ["true", "false"]}, "labels[0] must be true or false"),
    "step label null": unread(STEPS, "standard", {"labels": [True, None]}, "labels[1] must be true or false, not null"),
    "step labels too few": unread(STEPS, "standard", {"labels": [True]}, "2 completions and 1 labels"),
    "step labels too many": unread(STEPS, "standard", {"labels": [True, True, False]}, "2 completions and 3 labels"),
    "step labels one for all": unread(STEPS, "standard", {"labels": True}, "labels"),
    "steps in one string": unread(STEPS, "standard", {"completions": R}, "completions"),
    "steps none": unread(STEPS, "standard", {"completions": [], "labels": []}, "completions is empty"),
    "step null": unread(STEPS, "standard", {"completions": [R, None]}, "completions[1] must be a string, not null"),
    "steps as messages": unread(STEPS, "standard", {"completions": [assistant(R)] * 2}, "completions[0] must be a string"),
    "steps all right": of_set(STEPS, "standard", every(lambda row: {"labels": [True, True]}), "wrong-steps"),
    "steps all wrong": of_set(STEPS, "standard", every(lambda row: {"labels": [False, False]}), "right-steps"),
}

LEAKED, LONG = EXAM
SETS = {
    "rows twice": breaks(LM, "standard", copied(3, 7, 12), "duplicate", 7, 12),
    "conversations twice": breaks(LM, "conversational", copied(3, 7, 12), "duplicate", 7, 12),
    "completions twice": breaks(PC, "standard", copied(3, 7, 12), "duplicate", 7, 12),
    "pairs twice": breaks(PREF, "implicit", copied(3, 7, 12), "duplicate", 7, 12),
    "prompts twice": breaks(PROMPTS, "standard", copied(3, 7, 12), "duplicate", 7, 12),
    "labelled replies twice": breaks(KTO, "standard", copied(3, 7, 12), "duplicate", 7, 12),
    "steps twice": breaks(STEPS, "standard", copied(3, 7, 12), "duplicate", 7, 12),
    "calls twice": breaks(LM, "tools", copied(3, 7, 12), "duplicate", 7, 12),
    "set in the place of itself twice": breaks(
        PC, "standard", lambda rows: rows.extend(clean(PC, "standard")), "duplicate", *range(ROWS + 1, 2 * ROWS + 1)
    ),
    "question twice": breaks(EVAL, "standard", copied(3, 7), "duplicate-prompt"),
    "question twice in conversations": breaks(EVAL, "conversational", copied(3, 7), "duplicate-prompt"),
    "question with two answers": breaks(
        EVAL, "standard", copied(3, 7, answer="nothing"), "rival-answer", 3, 7, implied=("duplicate-prompt",)
    ),
    "exam in a prompt": breaks(PC, "standard", {"prompt": LEAKED}, "overlap-eval"),
    "exam in a prompt in capitals": breaks(PC, "standard", {"prompt": LEAKED.upper()}, "overlap-eval"),
    "exam in a prompt with other white space": breaks(PROMPTS, "standard", {"prompt": f" {LEAKED} \n"}, "overlap-eval"),
    "exam in a conversation": breaks(LM, "conversational", chat(user(LEAKED), assistant(R)), "overlap-eval"),
    "exam in a later turn": breaks(
        LM, "turns", chat(user(Q), assistant(R), user(LEAKED), assistant("A lark.")), "overlap-eval"
    ),
    "exam after a system turn": breaks(PREF, "conversational", {"prompt": [system("Be brief."), user(LEAKED)]}, "overlap-eval"),
    "exam in an implicit prompt": breaks(
        PREF, "implicit", {side: [user(LEAKED), assistant(side)] for side in ("chosen", "rejected")}, "overlap-eval"
    ),
    "exam with its labels": breaks(KTO, "standard", {"prompt": LEAKED}, "overlap-eval"),
    "exam in steps": breaks(STEPS, "standard", {"prompt": LEAKED}, "overlap-eval"),
    "exam in a ShareGPT turn": breaks(
        LM, "sharegpt", {"conversations": [turn("human", LEAKED), turn("gpt", "A lark.")]}, "overlap-eval"
    ),
    "exam in an Alpaca instruction": breaks(PC, "alpaca", {"instruction": LEAKED}, "overlap-eval"),
    "exam in another exam": breaks(EVAL, "standard", {"prompt": LEAKED}, "overlap-eval"),
    "exam quoted in a text": breaks(LM, "standard", {"text": f"He asked: {LONG} Nobody knew."}, "quotes-eval"),
    "exam quoted in a reply": breaks(PC, "conversational", {"completion": [assistant(f"You mean: {LONG}")]}, "quotes-eval"),
    "exam quoted in a rejected reply": breaks(PREF, "standard", {"rejected": f"{LONG.upper()} I pass."}, "quotes-eval"),
    "exam quoted in thirteen words": breaks(LM, "standard", {"text": " ".join(LONG.split()[3:16])}, "quotes-eval"),
    "exam quoted in a step": breaks(STEPS, "standard", {"completions": [LONG + " Well.", R]}, "quotes-eval"),
    "exam quoted in a prompt with its template": breaks(
        PROMPTS, "standard", {"prompt": f"Question: {LONG}\nAnswer:"}, "quotes-eval"
    ),
}

LAYOUT = {
    "ShareGPT speaker unknown": unread(LM, "sharegpt", {"conversations": [turn("user", Q), turn("gpt", R)]}, "'user'"),
    "ShareGPT speaker is bing": unread(PC, "sharegpt", {"conversations": [turn("human", Q), turn("bing", R)]}, "'bing'"),
    "ShareGPT call in a turn": unread(
        LM, "sharegpt", {"conversations": [turn("human", Q), turn("function_call", "{}")]}, "'function_call'"
    ),
    "ShareGPT value null": unread(LM, "sharegpt", {"conversations": [turn("human", Q), turn("gpt", None)]}, "not null"),
    "ShareGPT turn with a weight": unread(
        LM, "sharegpt", {"conversations": [turn("human", Q), turn("gpt", R) | {"weight": 1}]}, "TRL knows no weights"
    ),
    "ShareGPT turns none": unread(PC, "sharegpt", {"conversations": []}, "conversations is empty"),
    "ShareGPT turns called messages": unread(
        LM, "sharegpt", lambda rows: rows.__setitem__(6, chat(user(Q), assistant(R))), "Use layout 'trl'"
    ),
    "ShareGPT column too many": unread(LM, "sharegpt", {"id": "identity_0"}, "id is not a column"),
    "ShareGPT ends with the human": unread(
        PC, "sharegpt", {"conversations": [turn("gpt", R), turn("human", Q)]}, "the last turn must be from gpt"
    ),
    "ShareGPT begins with gpt": breaks(
        LM, "sharegpt", {"conversations": [turn("gpt", "Hello!"), turn("human", Q), turn("gpt", R)]}, "turn-order"
    ),
    "ShareGPT with a system turn and a system column": breaks(
        LM,
        "sharegpt",
        {"conversations": [turn("system", "Be brief."), turn("human", Q), turn("gpt", R)], "system": "Be kind."},
        "turn-order",
    ),
    "ShareGPT chosen by the human": breaks(PREF, "sharegpt", {"chosen": turn("human", R)}, "chosen-order"),
    "ShareGPT rejected missing": unread(PREF, "sharegpt", without("rejected"), "rejected is missing"),
    "ShareGPT chosen a string": unread(PREF, "sharegpt", {"chosen": R}, "chosen"),
    "ShareGPT tag a number": unread(KTO, "sharegpt", {"kto_tag": 1}, "must be true or false"),
    "Alpaca input null": unread(PC, "alpaca", {"input": None}, "input must be a string, not null"),
    "Alpaca output null": unread(LM, "alpaca", {"output": None}, "output must be a string, not null"),
    "Alpaca output missing": unread(LM, "alpaca", without("output"), "output is missing"),
    "Alpaca history": unread(PC, "alpaca", {"history": [["Hi", "Hello"]]}, "history is not a"),
    "Alpaca output a list": unread(PC, "alpaca", {"output": [R]}, "output must be a string"),
    "Alpaca output empty": breaks(PC, "alpaca", {"output": ""}, "empty-text"),
    "Alpaca instruction and input empty": breaks(PC, "alpaca", {"instruction": ""}, "empty-text"),
    "Alpaca question twice": breaks(EVAL, "alpaca", copied(3, 7), "duplicate-prompt"),
}

DEFECTS = SCHEMA | ROLES | BLANK | CONTENT | CALLS | PAIRS | SETS | LAYOUT

# What a person should look at and what may still train: the rule says it with its lines, and blocks nothing.
WARNED = {
    "completion is the prompt": breaks(PC, "standard", {"completion": Q}, "echo"),
    "judged reply is the prompt": breaks(KTO, "conversational", {"completion": [assistant(Q)]}, "echo"),
    "rejected cut short": breaks(
        PREF,
        "standard",
        lambda rows: [rows[n].update(rejected=rows[n]["chosen"][:9]) for n in (6, 11)],
        "rejected-cut",
        7,
        12,
    ),
    "chosen cut short": breaks(
        PREF,
        "standard",
        lambda rows: [rows[n].update(chosen=rows[n]["rejected"][:9]) for n in (6, 11)],
        "chosen-cut",
        7,
        12,
    ),
    "chosen out of all proportion": breaks(
        PREF, "standard", lambda rows: [rows[n].update(chosen=f"{n} " * 300) for n in (7, 11)], "length-outlier", 8, 12
    ),
    "prompt with two replies": breaks(
        PC,
        "standard",
        lambda rows: [rows[n].update(prompt=rows[2]["prompt"]) for n in (6, 11)],
        "duplicate-prompt",
        7,
        12,
    ),
    "chosen longer in all rows": breaks(
        PREF,
        "standard",
        lambda rows: [row.update(rejected=f"No {n}.") for n, row in enumerate(rows)],
        "chosen-longer",
        *ALL,
    ),
    "labels hardly ever false": of_set(
        KTO, "standard", lambda rows: [row.update(label=n > 0) for n, row in enumerate(rows)], "label-balance"
    ),
}
