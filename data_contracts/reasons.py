"""Why a row is not of its kind, in the words of the person who made the file."""

import re
from collections.abc import Iterable

from pydantic import ValidationError

from data_contracts.kinds import KINDS, RESERVED_COLUMNS, TOOLS, Kind
from data_contracts.layouts import layout_of

_SAID = {
    "missing": "is missing",
    "extra_forbidden": "is not a column or key of this row",
    "string_type": "must be a string, not {}",
    "list_type": "must be a list of messages, not {}",
    "model_type": "must be a message with role and content, not {}",
    "model_attributes_type": "must be a message with role and content, not {}",
    "bool_type": "must be true or false, not {}",
    "dict_type": "must be an object, not {}; JSON in a string must be parsed first",
    "too_short": "is empty",
}


# What makes rows of one kind those of another: our own renaming of columns, or a line of `datasets` as TRL documents it.
_TAKE = "Take of them columns {{{}}}"
_TO_MESSAGES = (
    'Join them: dataset.map(lambda row: {{"messages": row["prompt"] + row["{0}"]}}, remove_columns=dataset.column_names)'
)
_CONVERSIONS = {
    ("preference", "prompt_completion"): _TAKE.format("prompt: prompt, completion: chosen"),
    ("preference", "prompt_only"): _TAKE.format("prompt: prompt"),
    ("preference", "language_modeling"): _TO_MESSAGES.format("chosen"),
    ("preference", "unpaired_preference"): "Split each pair: trl.unpair_preference_dataset(dataset)",
    ("prompt_completion", "prompt_only"): _TAKE.format("prompt: prompt"),
    ("prompt_completion", "language_modeling"): _TO_MESSAGES.format("completion"),
    ("prompt_completion", "eval"): _TAKE.format("prompt: prompt, answer: completion"),
    ("language_modeling", "prompt_completion"): (
        'Split them: dataset.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, '
        'remove_columns="messages")'
    ),
    ("unpaired_preference", "prompt_only"): _TAKE.format("prompt: prompt"),
    ("unpaired_preference", "prompt_completion"): (
        'Keep what was liked: dataset.filter(lambda row: row["label"]).remove_columns("label")'
    ),
    ("stepwise_supervision", "prompt_only"): _TAKE.format("prompt: prompt"),
}


def first_reason(error: ValidationError) -> str:
    """Say the first thing that is wrong with a row, and how many more there are."""
    details = error.errors(include_url=False)
    first = details[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    said = _of_a_key(first) or _SAID.get(first["type"]) or _own_words(first)
    more = f" (and {len(details) - 1} more in this row)" if len(details) > 1 else ""
    return f"{path} {said.replace('{}', shown(first['input']))}{more}".strip()


# Keys of OpenAI's messages that mean something, of which TRL and most templates take no notice.
_UNHEEDED = {
    "name": (
        "would be lost without a word: most chat templates show no name, and two speakers of one role become one. "
        "Write it into the content if it matters, then drop it"
    ),
    "weight": (
        "would be lost without a word: TRL knows no weights and trains on a turn of weight 0 as on any other. To train on the "
        "last turn alone make prompt_completion rows; to train on every turn drop it"
    ),
}


def _of_a_key(detail: dict) -> str | None:
    """Say what becomes of a message's key that is refused for what it means, and how to do without it."""
    if detail["type"] != "extra_forbidden" or len(detail["loc"]) != 3 or detail["loc"][2] not in _UNHEEDED:
        return None
    column, _, key = detail["loc"]
    turns = f'[{{k: v for k, v in turn.items() if k != "{key}"}} for turn in row["{column}"]]'
    return f'{_UNHEEDED[key]}: dataset.map(lambda row: {{"{column}": {turns}}})'


def _own_words(detail: dict) -> str:
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    return detail["msg"][0].lower() + detail["msg"][1:] + ", not {}"


_VALUE = re.compile(r"(?s), not .*|(?<=answers no call )'.*?'|(?<=held-out row ).*")
_NUMBER = re.compile(r"\b(?:0x[0-9a-f]+|\d+)\b")


def by_sort(reasons: Iterable[str]) -> dict[str, list[int]]:
    """Return an example of each sort of reason and the places of all reasons of that sort, in their order.

    Two are of one sort if they differ only in what is the row's own: its value, and places and counts in it.
    """
    examples: dict[str, str] = {}
    found: dict[str, list[int]] = {}
    differ: set[str] = set()
    for place, reason in enumerate(reasons):
        sort = _NUMBER.sub("…", _VALUE.sub("", reason))
        example = examples.setdefault(sort, reason)
        found.setdefault(sort, []).append(place)
        if reason != example:
            differ.add(sort)
    return {("e.g. " if sort in differ else "") + examples[sort]: places for sort, places in found.items()}


def shortened(text: str, chars: int) -> str:
    """Return a text in one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= chars else line[: chars - 1] + "…"


def shown(value: object) -> str:
    """Return a value in at most 40 characters, with its type unless it is a string."""
    if value is None:
        return "null"
    text = "" if isinstance(value, (dict, list)) else repr(value)
    text = text if len(text) <= 40 else text[:37] + "…"
    return text if isinstance(value, str) else f"{type(value).__name__} {text}".strip()


def refuse_other_columns(columns: set[str], kind: Kind, layout: str) -> None:
    """Raise ValueError if the columns are those of another kind or layout than the one that was asked for."""
    found = ", ".join(sorted(columns)) or "none"
    if layout != "trl":
        if columns & {"prompt", "messages", "text"}:
            raise ValueError(f"this is not layout {layout!r}: the columns {found} are TRL's own. Use layout 'trl'")
        return
    if other := layout_of(columns):
        raise ValueError(f"the columns {found} are those of layout {other!r}. Read it with that layout")
    if _fit(columns, kind):
        return
    if (likely := _nearest(columns)) and likely != kind:
        way = _CONVERSIONS.get((likely.name, kind.name))
        raise ValueError(f"these look like {likely.name} rows ({found}); {kind.explain()}{f'. {way}' if way else ''}")
    if not columns & {*kind.standard, *kind.conversational}:
        raise ValueError(f"the columns are {found}; {kind.explain()}. Say which is which: columns {{{kind.standard[0]}: …}}")
    own = [name for name in kind.columns("standard") + kind.columns("conversational") if name in columns]
    more = columns - {*own, TOOLS}
    if more and _fit(set(own), kind):
        own += [TOOLS] if TOOLS in columns and kind.takes_tools else []
        named = ", ".join(f"{name}: {name}" for name in dict.fromkeys(own))
        raise ValueError(f"has more columns than {kind.name} rows: {', '.join(sorted(more))}. Leave them: columns {{{named}}}")


def _nearest(columns: set[str]) -> Kind | None:
    """Return the kind whose columns these are, whatever else the rows have; the one that names most of them."""
    fitting = [kind for kind in KINDS.values() if not kind.extra_columns and _has(columns, kind)]
    return max(fitting, key=lambda kind: len(kind.columns("standard")), default=None)


def _has(columns: set[str], kind: Kind) -> bool:
    return any(own <= columns for own in _own(kind))


def _own(kind: Kind) -> list[set[str]]:
    """Return the sets of columns that rows of a kind may have."""
    own = [set(kind.columns("standard"))] + ([set(kind.columns("conversational"))] if kind.conversational else [])
    if kind.name == "preference":  # the prompt is then what both begin with
        own.append({"chosen", "rejected"})
    if kind.name == "unpaired_preference":  # the reply is then the last turn
        own.append({"messages", "label"})
    return own


def _fit(columns: set[str], kind: Kind) -> bool:
    more = kind.extra_columns and not columns & RESERVED_COLUMNS
    given = columns - {TOOLS} if kind.takes_tools else columns
    return any(given == own or (more and own <= columns) for own in _own(kind))
