"""The kinds of row that TRL's trainers take, and the strict model of each.

A kind has two forms: `standard` (its fields are strings) and `conversational` (its fields are lists of messages).
Fields carry TRL's own names, https://huggingface.co/docs/trl/dataset_formats.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

Form = Literal["standard", "conversational"]
ROLE_CODES = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
CALL_CODE = "c"  # an assistant's turn that calls tools
TOOLS = "tools"  # the column that says which tools the conversation has


class Strict(BaseModel):
    """Anything but exactly these keys and types is refused, as readers that coerce rewrite text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Function(Strict):
    name: str = Field(min_length=1)
    arguments: dict[str, Any]  # as text a template would quote it a second time


class ToolCall(Strict):
    type: Literal["function"]
    function: Function
    id: str | None = None


def _no_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")


def _from_json(value: Any) -> Any:
    """Return what a string holds as JSON: Parquet has no other way to keep objects that differ from row to row."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value, parse_constant=_no_constant)
        if "\\ud" in value.lower():  # half a surrogate pair in quotes in quotes, which Arrow cannot hold
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("is JSON that is nested too deeply") from None
    return found


class ToolMessage(Strict):
    """A turn of a conversation with tools. A call may stand without text; what a tool said may name its call."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: Annotated[Annotated[list[ToolCall], Field(min_length=1)] | None, BeforeValidator(_from_json)] = None
    tool_call_id: str | None = None
    name: str | None = None


def _spoken(message: ToolMessage) -> ToolMessage:
    if message.tool_calls and message.role != "assistant":
        raise ValueError(f"is a {message.role} turn with tool_calls; only the assistant calls tools")
    if message.content is None and not message.tool_calls:
        raise ValueError("has neither content nor tool_calls")
    return message


def _answered(messages: list[ToolMessage]) -> list[ToolMessage]:
    """Refuse what a tool said without a call before it, or in answer to another one; some sets write calls into the text."""
    waiting: list[ToolCall] = []
    in_text = False
    for number, message in enumerate(messages):
        if message.role != "tool":
            waiting = list(message.tool_calls or ())
            in_text = message.role == "assistant" and not waiting
            continue
        if in_text:
            continue
        answered = [call for call in waiting if None in (call.id, message.tool_call_id) or call.id == message.tool_call_id]
        if not answered:
            named = f" {message.tool_call_id!r}" if waiting and message.tool_call_id else ""
            raise ValueError(f"[{number}] is a tool turn that answers no call{named}; a call stands in `tool_calls` before it")
        waiting.remove(answered[0])
    return messages


def _tools(value: Any) -> Any:
    tools = _from_json(value)
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('must be a list of {"type": "function", "function": {"name": …}}, a JSON Schema each')
    return tools


@dataclass(frozen=True)
class Kind:
    """What one row holds: text fields per form, other texts and labels beside them, and whether more columns may follow."""

    name: str
    standard: tuple[str, ...]
    conversational: tuple[str, ...] = ()  # none: TRL has no such form
    strings: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()  # lists of strings
    labels: Mapping[str, Any] = field(default_factory=dict, hash=False)  # by their types
    extra_columns: bool = False
    takes_tools: bool = False

    def fields(self, form: Form) -> tuple[str, ...]:
        """Return the fields that hold text (standard) or messages (conversational)."""
        return self.standard if form == "standard" else self.conversational

    def columns(self, form: Form) -> tuple[str, ...]:
        return self.fields(form) + self.strings + self.steps + tuple(self.labels)

    def texts(self) -> tuple[str, ...]:
        """Return every column that holds text, by the names that facts use: the conversational ones, for both forms."""
        return (self.conversational or self.standard) + self.strings + self.steps

    def explain(self) -> str:
        """Say which columns rows of this kind have, for a person who gave other ones."""
        forms: tuple[Form, ...] = ("standard", "conversational") if self.conversational else ("standard",)
        wanted = ", or ".join(", ".join(columns) for columns in dict.fromkeys(self.columns(form) for form in forms))
        more = " (and any other columns of plain values)" if self.extra_columns else ""
        return f"{self.name} rows have {wanted}{more}"


_PAIR = ("prompt", "chosen", "rejected")
KINDS = {
    kind.name: kind
    for kind in (
        Kind("language_modeling", ("text",), ("messages",), takes_tools=True),
        Kind("prompt_completion", ("prompt", "completion"), ("prompt", "completion"), takes_tools=True),
        Kind("preference", _PAIR, _PAIR, takes_tools=True),
        Kind(
            "unpaired_preference",
            *(("prompt", "completion"), ("prompt", "completion")),
            labels={"label": bool},
            takes_tools=True,
        ),
        Kind("stepwise_supervision", ("prompt",), steps=("completions",), labels={"labels": list[bool]}),
        Kind("prompt_only", ("prompt",), ("prompt",), extra_columns=True),
        Kind("eval", ("prompt",), ("prompt",), strings=("answer",), extra_columns=True),
    )
}

# Columns that may not be an extra: those that make a row one of another kind, `row`, which is ours, and those by which
# TRL's GRPO and RLOO trainers call a reward function (an equal name there is a TypeError at the first step).
RESERVED_COLUMNS = frozenset(
    {"text", "messages", "completion", "chosen", "rejected", "label", "labels", "images", TOOLS, "row"}
    | {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


def kind_of(name: str) -> Kind:
    """Return the kind of that name, or say which names there are."""
    if name not in KINDS:
        raise ValueError(f"no kind of row is called {name!r}; there are {', '.join(KINDS)}")
    return KINDS[name]


@cache
def row_model(kind: Kind, form: Form, with_tools: bool = False) -> type[BaseModel]:
    """Return the strict model of one row: its columns and, except where the kind takes others, nothing else."""
    message = Annotated[ToolMessage, AfterValidator(_spoken)] if with_tools else Message
    text = str if form == "standard" else Annotated[list[message], Field(min_length=1)]
    if with_tools:
        text = Annotated[text, AfterValidator(_answered)]
    columns = dict.fromkeys(kind.fields(form), (text, ...)) | dict.fromkeys(kind.strings, (str, ...))
    columns |= dict.fromkeys(kind.steps, (Annotated[list[str], Field(min_length=1)], ...))
    columns |= {name: (type_, ...) for name, type_ in kind.labels.items()}
    columns |= {TOOLS: (Annotated[list[dict[str, Any]] | str, AfterValidator(_tools)], ...)} if with_tools else {}
    config = ConfigDict(extra="allow" if kind.extra_columns else "forbid", strict=True)
    return create_model(f"{kind.name}_{form}", __config__=config, **columns)
