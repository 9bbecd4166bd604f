"""Why a row is not of its kind, in the words of the person who made the file."""

from pydantic import ValidationError

from data_contracts.kinds import KINDS, RESERVED_COLUMNS, Kind
from data_contracts.layouts import layout_of

_SAID = {
    "missing": "is missing",
    "extra_forbidden": "is not a column or key of this row",
    "string_type": "must be a string, not {}",
    "list_type": "must be a list of messages, not {}",
    "model_type": "must be a message with role and content, not {}",
    "model_attributes_type": "must be a message with role and content, not {}",
    "too_short": "has no messages",
}


def first_reason(error: ValidationError) -> str:
    """Say the first thing that is wrong with a row, and how many more there are."""
    details = error.errors(include_url=False)
    first = details[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    said = _SAID.get(first["type"], first["msg"][0].lower() + first["msg"][1:] + ", not {}")
    more = f" (and {len(details) - 1} more in this row)" if len(details) > 1 else ""
    return f"{path} {said.replace('{}', shown(first['input']))}{more}".strip()


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
    likely = next((it for it in KINDS.values() if _fit(columns, it) and not it.extra_columns), None)
    if likely:
        raise ValueError(f"these look like {likely.name} rows ({found}); {kind.explain()}")
    if not columns & {*kind.standard, *kind.conversational}:
        raise ValueError(f"the columns are {found}; {kind.explain()}")


def _fit(columns: set[str], kind: Kind) -> bool:
    if kind.name == "preference" and columns == {"chosen", "rejected"}:
        return True  # the prompt is then what both begin with
    wanted = (set(kind.columns("standard")), set(kind.columns("conversational")))
    more = kind.extra_columns and not columns & RESERVED_COLUMNS
    return any(columns == own or (more and own <= columns) for own in wanted)
