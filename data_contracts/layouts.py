"""Explicit conversions into TRL's rows from the two layouts that most published sets have: ShareGPT and Alpaca.

A conversion renames; it never guesses. What a layout cannot say exactly in TRL's words is refused, not dropped: dropped are
only keys that say nothing, with which dumps of OpenAI's SDK fill each message.
"""

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from data_contracts.kinds import TOOLS, Kind

LAYOUTS = ("trl", "sharegpt", "alpaca")


class Turn(BaseModel):
    """A ShareGPT turn."""

    model_config = ConfigDict(extra="forbid", strict=True)
    from_: Literal["system", "human", "gpt", "observation"] = Field(alias="from")
    value: str

    def message(self) -> dict[str, str]:
        return {"role": _SHAREGPT_ROLES[self.from_], "content": self.value}


_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool"}


class ShareGPT(BaseModel):
    """`conversations`, with `system` beside it in some sets."""

    model_config = ConfigDict(extra="forbid", strict=True)
    conversations: list[Turn] = Field(min_length=1)
    system: str = ""

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [turn.message() for turn in self.conversations]


class ShareGPTPreference(ShareGPT):
    chosen: Turn
    rejected: Turn


class ShareGPTUnpaired(ShareGPT):
    label: bool = Field(validation_alias=AliasChoices("label", "kto_tag"))


class Alpaca(BaseModel):
    """One instruction, what it is applied to (may be empty), and the reply."""

    model_config = ConfigDict(extra="forbid", strict=True)
    instruction: str
    input: str = ""
    output: str
    system: str = ""

    def prompt(self) -> list[dict[str, str]]:
        """Return the system and the user turn; instruction and input stand apart by one empty line."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": asked}]


def _sharegpt_conversation(row: object) -> dict[str, object]:
    return {"messages": ShareGPT.model_validate(row).messages()}


def _sharegpt_completion(row: object) -> dict[str, object]:
    messages = ShareGPT.model_validate(row).messages()
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the last turn must be from gpt, with a turn before it: it becomes the completion")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _sharegpt_preference(row: object) -> dict[str, object]:
    pair = ShareGPTPreference.model_validate(row)
    return {"prompt": pair.messages(), "chosen": [pair.chosen.message()], "rejected": [pair.rejected.message()]}


def _sharegpt_unpaired(row: object) -> dict[str, object]:
    given = ShareGPTUnpaired.model_validate(row)
    return _split_reply({"messages": given.messages(), "label": given.label})


def _alpaca_conversation(row: object) -> dict[str, object]:
    turn = Alpaca.model_validate(row)
    return {"messages": [*turn.prompt(), {"role": "assistant", "content": turn.output}]}


def _alpaca_completion(row: object) -> dict[str, object]:
    turn = Alpaca.model_validate(row)
    return {"prompt": turn.prompt(), "completion": [{"role": "assistant", "content": turn.output}]}


def _alpaca_eval(row: object) -> dict[str, object]:
    turn = Alpaca.model_validate(row)
    return {"prompt": turn.prompt(), "answer": turn.output}


_CONVERSIONS = {
    ("sharegpt", "language_modeling"): _sharegpt_conversation,
    ("sharegpt", "prompt_completion"): _sharegpt_completion,
    ("sharegpt", "preference"): _sharegpt_preference,
    ("sharegpt", "unpaired_preference"): _sharegpt_unpaired,
    ("alpaca", "language_modeling"): _alpaca_conversation,
    ("alpaca", "prompt_completion"): _alpaca_completion,
    ("alpaca", "eval"): _alpaca_eval,
}


def check_layout(layout: str, kind: Kind) -> None:
    """Raise ValueError if rows of that layout cannot become rows of that kind."""
    if layout not in LAYOUTS:
        raise ValueError(f"no layout is called {layout!r}; there are {', '.join(LAYOUTS)}")
    if layout != "trl" and (layout, kind.name) not in _CONVERSIONS:
        fits = ", ".join(name for given, name in _CONVERSIONS if given == layout)
        raise ValueError(f"layout {layout!r} holds no {kind.name} rows; it can be read as {fits}")


def to_trl(row: object, layout: str, kind: Kind) -> object:
    """Return the row in TRL's words. Raises ValueError (pydantic's is one) with what the layout lacks."""
    if layout != "trl":
        return _CONVERSIONS[layout, kind.name](row)
    row = _without_empty_keys(row, {*kind.conversational, "messages"})
    if kind.name == "preference":
        return explicit_prompt(row)
    return _split_reply(row) if kind.name == "unpaired_preference" else row


# What a message may carry in OpenAI's SDK, and in the servers that speak like it, beside role and content.
_SDK_KEYS = frozenset(
    {"refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id", "name", "weight", "parsed"}
    | {"reasoning", "reasoning_content"}
)


def _without_empty_keys(row: object, columns: set[str]) -> object:
    """Leave such keys out of a row's messages where they hold nothing.

    A template that asks what such a key holds renders the same without it; one that only asks whether it is there would raise.
    """
    if not isinstance(row, dict):
        return row
    return {name: _filled(value) if name in columns and isinstance(value, list) else value for name, value in row.items()}


def _filled(turns: list) -> list:
    return [
        {name: value for name, value in turn.items() if name not in _SDK_KEYS or value not in (None, "", [], {})}
        if isinstance(turn, dict) and not _SDK_KEYS.isdisjoint(turn)
        else turn
        for turn in turns
    ]


def explicit_prompt(row: object) -> object:
    """Give a preference row without `prompt` the turns that chosen and rejected share as its prompt.

    TRL does the same at training time; here it is done once and judged. The last turn of either side is never part of
    the prompt, so that a tie keeps its reply, and is seen as a tie.
    """
    if not isinstance(row, dict) or set(row) - {TOOLS} != {"chosen", "rejected"}:
        return _refuse_two_prompts(row)
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        raise ValueError("prompt is missing, and in plain strings nothing marks where it ends. Add a prompt column")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return row
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise ValueError("prompt is missing, and chosen and rejected do not begin with the same message")
    return row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _refuse_two_prompts(row: object) -> object:
    """Refuse a prompt in a string beside whole conversations, which begin with it: UltraFeedback has both."""
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list):
        raise ValueError(
            "prompt is a string beside conversations that begin with it. Leave it: columns {chosen: chosen, rejected: rejected}"
        )
    return row


def _split_reply(row: object) -> Any:
    """Give an unpaired row of whole conversations, as LLaMA-Factory has them, its last turn as the completion."""
    if not isinstance(row, dict) or set(row) - {TOOLS} != {"messages", "label"} or not isinstance(row["messages"], list):
        return row
    if len(row["messages"]) < 2:
        raise ValueError("messages must have a turn before the one that label is about")
    rest = {name: value for name, value in row.items() if name != "messages"}
    return rest | {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def layout_of(columns: set[str]) -> str | None:
    """Return the layout whose columns these are, to name it to a person who did not."""
    if "conversations" in columns:
        return "sharegpt"
    return "alpaca" if {"instruction", "output"} <= columns else None
