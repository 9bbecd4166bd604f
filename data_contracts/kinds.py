"""The kinds of row that TRL's trainers take, and the strict model of each.

A kind has two forms: `standard` (its fields are strings) and `conversational` (its fields are lists of messages).
Fields carry TRL's own names, https://huggingface.co/docs/trl/dataset_formats.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

Form = Literal["standard", "conversational"]
ROLE_CODES = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}


class Message(BaseModel):
    """One turn. Anything but exactly these two strings is refused, as readers that coerce rewrite text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True)
class Kind:
    """What one row holds: text fields per form, plain strings beside them, and whether other columns may follow."""

    name: str
    standard: tuple[str, ...]
    conversational: tuple[str, ...]
    strings: tuple[str, ...] = ()
    extra_columns: bool = False

    def fields(self, form: Form) -> tuple[str, ...]:
        """Return the fields that hold text (standard) or messages (conversational)."""
        return self.standard if form == "standard" else self.conversational

    def columns(self, form: Form) -> tuple[str, ...]:
        return self.fields(form) + self.strings

    def explain(self) -> str:
        """Say which columns rows of this kind have, for a person who gave other ones."""
        spelled = dict.fromkeys((self.columns("standard"), self.columns("conversational")))
        wanted = ", or ".join(", ".join(columns) for columns in spelled)
        more = " (and any other columns of plain values)" if self.extra_columns else ""
        return f"{self.name} rows have {wanted}{more}"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("language_modeling", ("text",), ("messages",)),
        Kind("prompt_completion", ("prompt", "completion"), ("prompt", "completion")),
        Kind("preference", ("prompt", "chosen", "rejected"), ("prompt", "chosen", "rejected")),
        Kind("prompt_only", ("prompt",), ("prompt",), extra_columns=True),
        Kind("eval", ("prompt",), ("prompt",), strings=("answer",), extra_columns=True),
    )
}

# Columns that may not be an extra: those that make a row one of another kind, `row`, which is ours, and those by which
# TRL's GRPO and RLOO trainers call a reward function (an equal name there is a TypeError at the first step).
RESERVED_COLUMNS = frozenset(
    {"text", "messages", "completion", "chosen", "rejected", "label", "images", "tools", "row"}
    | {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


def kind_of(name: str) -> Kind:
    """Return the kind of that name, or say which names there are."""
    if name not in KINDS:
        raise ValueError(f"no kind of row is called {name!r}; there are {', '.join(KINDS)}")
    return KINDS[name]


@cache
def row_model(kind: Kind, form: Form) -> type[BaseModel]:
    """Return the strict model of one row: its columns and, except where the kind takes others, nothing else."""
    text = str if form == "standard" else Annotated[list[Message], Field(min_length=1)]
    columns = dict.fromkeys(kind.fields(form), (text, ...)) | dict.fromkeys(kind.strings, (str, ...))
    config = ConfigDict(extra="allow" if kind.extra_columns else "forbid", strict=True)
    return create_model(f"{kind.name}_{form}", __config__=config, **columns)
