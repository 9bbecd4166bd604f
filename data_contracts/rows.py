"""Strict reading: a file of one kind of row into a canonical Arrow table, or a refusal that names every bad row.

`datasets.load_dataset("json")` is not used on purpose: one message with a number for content makes datasets 5.2 add
JSON quotes to the text of 48,000 of 200,000 good rows and more, without a word. polars and DuckDB coerce or drop.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from data_contracts.canonical import RowsFile, RowsWriter
from data_contracts.kinds import RESERVED_COLUMNS, TOOLS, Form, Kind, ToolMessage, kind_of, row_model
from data_contracts.layouts import check_layout, to_trl
from data_contracts.native import NativeReader, native_reader
from data_contracts.places import Places
from data_contracts.reasons import by_sort, first_reason, refuse_other_columns, shown
from data_contracts.sources import KIND_METADATA, RawLines, RawRow, Unreadable, raw_rows

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
# Of conversations with tools; `tool_calls` is JSON, as each call has arguments of its own.
TOOL_MESSAGES = pa.list_(pa.struct([(name, pa.string()) for name in ToolMessage.model_fields]))
_LABELS = {bool: pa.bool_(), list[bool]: pa.list_(pa.bool_())}
_SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
_PROBLEMS_MAX = 1000  # kept in the exception; the count goes on
_CHUNK_ROWS = 10_000
_ONE_FILE = Places()
_SETTLING_ROWS = 100  # most of which say what form the file's rows have, so that an odd one at its head is the one named


@dataclass(frozen=True)
class SetAside:
    """A row that does not train: its 1-based line in the whole source, every reason, and the row as far as it could be read."""

    line: int
    reasons: tuple[str, ...]
    value: object


class RowsRefused(ValueError):
    """Rows are not of their kind. `problems` has (1-based line, reason) of the first 1000 of `total` bad rows.

    Lines are counted through all files of the source; `places` knows the files.
    """

    def __init__(
        self,
        source: Path,
        kind: str,
        problems: list[tuple[int, str]],
        total: int,
        way_out: str = "",
        places: Places = _ONE_FILE,
    ):
        super().__init__(source, kind, problems, total, way_out, places)
        self.source, self.kind, self.problems, self.total = source, kind, problems, total
        self.way_out, self.places = way_out, places

    def __str__(self) -> str:
        sorts = by_sort(reason for _, reason in self.problems)
        named = {reason: self._named([self.problems[at][0] for at in places]) for reason, places in sorts.items()}
        shown = [f"  {lines}: {reason}" for reason, lines in islice(named.items(), 8)]
        more = [f"  … and {len(named) - 8:,} more reasons"] if len(named) > 8 else []
        counted = "1 problem" if self.total == 1 else f"{self.total:,} problems"
        head = f"{self.source} is not read as {self.kind} rows: {counted}"
        return "\n".join([head, *shown, *more, *([self.way_out] if self.way_out else [])])

    def _named(self, lines: list[int]) -> str:
        named = ", ".join(map(str, self.places.shown(lines[:5])))
        more = f" and {len(lines) - 5:,} more" if len(lines) > 5 else ""
        return f"{named}{more}" if self.places.files else f"line {named}{more}"


def read_rows(source: Path, kind: str, **reading: Any) -> pa.Table:
    """Return rows of a source as a table, all of it in memory; `reading` and what is raised are those of `store_rows`."""
    tables: list[pa.Table] = []
    read_into(tables.append, source, kind, **reading)
    return pa.concat_tables(tables)


def store_rows(source: Path, kind: str, file: Path, **reading: Any) -> RowsFile:
    """Write rows of a source into a Parquet file of TRL's columns plus `row`, the row's 0-based number in the source.

    No more than a chunk of the rows is in memory at once. `reading` may have:

    - `layout`: one of `layouts.LAYOUTS`, "trl" if it is not given.
    - `columns`: the source's name for each of the kind's columns; its other columns are then left, because it says so.
    - `start`, `stop`: rows `start` up to `stop` are read.
    - `set_aside`: a list that bad rows are put into, the first 1000 of them.
    - `keep_rest`: they all are, and only a source with no good row is refused.

    Nothing is coerced, dropped or filled in. Raises RowsRefused with the line and the reason of each row that is not
    exactly of its kind, and leaves no file; ValueError for a kind, layout or range that does not exist.
    """
    with RowsWriter(file) as writer:
        places = read_into(writer.add, source, kind, **reading)
    return replace(writer.written(), places=places)


def read_into(
    keep: Callable[[pa.Table], None],
    source: Path,
    kind: str,
    *,
    layout: str = "trl",
    columns: Mapping[str, str] | None = None,
    start: int = 0,
    stop: int | None = None,
    set_aside: list[SetAside] | None = None,
    keep_rest: bool = False,
) -> Places:
    """Give the rows of a source to `keep`, some thousands at a time and in their order; the rest is as `store_rows` says.

    Returns where they stand. What `keep` was given is worth nothing if this raises RowsRefused.
    """
    asked = kind_of(kind)
    check_layout(layout, asked)
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"rows {start}:{stop} are none. Give 0 <= start < stop")
    reading = _Reading(asked, layout, dict(columns or {}), [] if set_aside is None else set_aside, keep_rest, keep)
    try:
        incoming = raw_rows(Path(source), start, stop)
        first = list(islice(incoming, 1))
        if first and isinstance(first[0], RawLines):
            reading.settle([first[0].row(index) for index in range(min(len(first[0].lines), _SETTLING_ROWS))])
        else:
            first += islice(incoming, _SETTLING_ROWS - 1)
            reading.settle([raw for raw in first if isinstance(raw, RawRow)])
        for raw in chain(first, incoming):
            if raw.file:
                reading.files[raw.before] = raw.file
            reading.take_lines(raw) if isinstance(raw, RawLines) else reading.take(raw)
    except Unreadable as error:
        raise RowsRefused(source, kind, [(error.line, error.reason)], 1) from error
    if reading.total and not (keep_rest and reading.num_rows):
        raise RowsRefused(
            source,
            kind,
            reading.problems,
            reading.total,
            f"Mend or remove these rows; {asked.explain()}. Names can be mapped (`columns`, --columns OURS=THEIRS). "
            "What the rows say is judged once all of them can be read.",
            reading.places(),
        )
    if not reading.num_rows:
        raise RowsRefused(source, kind, [(start + 1, f"there is no row {start}: the source ends before it")], 1)
    reading.flush()
    return reading.places()


@dataclass
class _Reading:
    """The good rows so far, the problems so far, and what its first rows settled for the whole file."""

    kind: Kind
    layout: str
    columns: dict[str, str]
    set_aside: list[SetAside]
    keep_rest: bool
    keep: Callable[[pa.Table], None]
    form: Form | None = None
    with_tools: bool = False
    extras: dict[str, type] = field(default_factory=dict)
    settled_by: str = ""  # the place of a row that is as the file's rows are
    pending: list[dict] = field(default_factory=list)
    native: NativeReader | None = None  # for the rest of the file, if its rows are such as it can read
    num_rows: int = 0
    files: dict[int, str] = field(default_factory=dict)  # by the rows before each, where they are several
    problems: list[tuple[int, str]] = field(default_factory=list)
    total: int = 0

    def places(self) -> Places:
        return Places(tuple(self.files.items()))

    def settle(self, rows: list[RawRow]) -> None:
        """Let what most of the first rows are, the first of equals, be what the file is; the odd ones are then the others."""
        shapes = [(shape, raw.place) for raw in rows if (shape := self._shape(raw))]
        counts = Counter((form, with_tools, frozenset(extras.items())) for (form, with_tools, extras), _ in shapes)
        for (form, with_tools, extras), place in shapes:
            if counts[form, with_tools, frozenset(extras.items())] == max(counts.values()):
                return self._settle(form, with_tools, extras, place)

    def _shape(self, raw: RawRow) -> tuple[Form, bool, dict[str, type]] | None:
        """Return a row's form, whether it has tools and the types of its extra columns; None of one that is no row alone."""
        if raw.problem:
            return None
        with suppress(ValueError):  # pydantic's is one
            row, form, with_tools = self._in_trls_words(raw.value)
            return form, with_tools, self._of_its_kind(row, form, with_tools)[1]
        return None

    def take_lines(self, raw: RawLines) -> None:
        """Take lines natively as far as that is beyond doubt, and the others one by one."""
        known = 0
        while known < len(raw.lines) and not self.settled_by:
            self.take(raw.row(known))
            known += 1
        spans = self.native.read(raw.lines, known) if self.native else [(known, len(raw.lines), None)]
        for begin, end, table in spans:
            if table is not None:
                self._keep_table(table, raw.number + begin)
            else:
                for index in range(begin, end):
                    self.take(raw.row(index))

    def take(self, raw: RawRow) -> None:
        """Keep one row, or the reason why not."""
        problem = raw.problem
        try:
            row = None if problem else self._checked(raw.value, raw.place)
        except ValidationError as error:
            problem = first_reason(error)
        except ValueError as error:
            problem = str(error)
        if problem:
            self.total += 1
            if len(self.problems) < _PROBLEMS_MAX:
                self.problems.append((raw.number + 1, problem))
            if self.keep_rest or len(self.set_aside) < _PROBLEMS_MAX:
                self.set_aside.append(SetAside(raw.number + 1, (problem,), raw.value))
        elif self._are_kept():
            self._keep({"row": raw.number, **row})

    def _are_kept(self) -> bool:
        return not self.total or self.keep_rest  # else the rest is read only for its problems

    def _checked(self, value: object, place: str) -> dict:
        """Return a row that is of its kind and as the file's other rows are."""
        row, form, with_tools = self._in_trls_words(value)
        if self.settled_by and form != self.form:
            raise ValueError(f"{form}, but {self.settled_by} is {self.form}; a dataset is one or the other")
        if self.settled_by and with_tools != self.with_tools:
            here, first = ("has" if it else "has no" for it in (with_tools, self.with_tools))
            raise ValueError(f"{here} tools, but {self.settled_by} {first}. Give every row the column, [] where none")
        row, extras = self._of_its_kind(row, form, with_tools)
        self._settle(form, with_tools, extras, place)
        return _canonical_tools(row, self.kind.fields(form)) if with_tools else row

    def _in_trls_words(self, value: object) -> tuple[Any, Form, bool]:
        """Return a row by TRL's columns, its form, and whether it has tools."""
        if not isinstance(value, dict):
            raise ValueError(f"a row must be an object with columns, not {shown(value)}")
        if self.columns:
            value = _taken(value, self.columns)
        refuse_other_columns(set(value), self.kind, self.layout)
        row = to_trl(value, self.layout, self.kind)
        form = _form(row, self.kind)
        return row, form, self.kind.takes_tools and form == "conversational" and TOOLS in row

    def _of_its_kind(self, row: Any, form: Form, with_tools: bool) -> tuple[dict, dict[str, type]]:
        """Return a row that is strictly of its kind, and the types of its extra columns."""
        if not with_tools:
            _refuse_calls(row, self.kind.fields(form))
        row = row_model(self.kind, form, with_tools).model_validate(row).model_dump()
        _refuse_uneven(row, self.kind)
        return row, _extras(row, (*self.kind.columns(form), TOOLS) if with_tools else self.kind.columns(form))

    def _settle(self, form: Form, with_tools: bool, extras: dict[str, type], place: str) -> None:
        """Fix the form and the types of extra columns, if nothing has yet, and hold the row to them."""
        if not self.settled_by:
            self.form, self.with_tools, self.extras, self.settled_by = form, with_tools, extras, place
            if self.layout == "trl" and not self.columns and not with_tools:
                self.native = native_reader(self.kind, form, self._schema())
        if extras == self.extras:
            return
        for name in sorted(self.extras.keys() | extras.keys()):
            here, first = (types[name].__name__ if name in types else "missing" for types in (extras, self.extras))
            if here != first:
                raise ValueError(f"column {name!r} is {here} here and {first} in {self.settled_by}")

    def _keep(self, row: dict) -> None:
        self.pending.append(row)
        self.num_rows += 1
        if len(self.pending) == _CHUNK_ROWS:
            self.flush()

    def _keep_table(self, table: pa.Table, number: int) -> None:
        """Keep a table of all columns but `row`, whose first row has that number."""
        if not self._are_kept():
            return
        self.flush()
        rows = pa.array(range(number, number + table.num_rows), pa.int64())
        self.keep(pa.table([*table.columns, rows], schema=self._schema()))
        self.num_rows += table.num_rows

    def flush(self) -> None:
        if self.pending:
            self.keep(pa.Table.from_pylist(self.pending, schema=self._schema()))
            self.pending = []

    def _schema(self) -> pa.Schema:
        text = pa.string() if self.form == "standard" else TOOL_MESSAGES if self.with_tools else MESSAGES
        fields = [(name, text) for name in self.kind.fields(self.form)]
        fields += [(name, pa.string()) for name in self.kind.strings + ((TOOLS,) if self.with_tools else ())]
        fields += [(name, pa.list_(pa.string())) for name in self.kind.steps]
        fields += [(name, _LABELS[type_]) for name, type_ in self.kind.labels.items()]
        fields += [(name, _SCALARS[type_]) for name, type_ in self.extras.items()]
        return pa.schema([*fields, ("row", pa.int64())], metadata={KIND_METADATA: self.kind.name.encode()})


def _form(row: dict, kind: Kind) -> Form:
    first = kind.conversational[:1]
    if first and first[0] in row and first[0] not in kind.standard:
        return "conversational"  # whatever it holds: the reason is then about `messages`, not about a missing `text`
    return "conversational" if first and isinstance(row.get(first[0]), list) else "standard"


def _refuse_calls(row: dict, fields: tuple[str, ...]) -> None:
    """Refuse tool calls in rows that do not say which tools there are: the template could not show them to the model."""
    turns = [turn for name in fields if isinstance(row.get(name), list) for turn in row[name] if isinstance(turn, dict)]
    if any(turn.get("tool_calls") for turn in turns):
        raise ValueError(f"has tool_calls and no column {TOOLS!r}. Give every row its tools, as JSON Schemas; [] where none")


def _refuse_uneven(row: dict, kind: Kind) -> None:
    for steps, labels in zip(kind.steps, kind.labels, strict=False):
        if len(row[steps]) != len(row[labels]):
            raise ValueError(f"has {len(row[steps])} {steps} and {len(row[labels])} {labels}; each step has one label")


def _canonical_tools(row: dict, fields: tuple[str, ...]) -> dict:
    """Return the row with its tools, and each turn's calls, as JSON."""
    texts = {name: [turn | {"tool_calls": _calls(turn["tool_calls"])} for turn in row[name]] for name in fields}
    tools = row[TOOLS]
    return row | texts | {TOOLS: tools if isinstance(tools, str) else _json(tools)}


def _calls(calls: list[dict] | None) -> str | None:
    """Return the calls as JSON, without an id where there was none: some templates write it."""
    if calls is None:
        return None
    kept = [{name: value for name, value in call.items() if value is not None} for call in calls]
    return _json(kept)


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:  # a date or bytes, of which Parquet has types
        raise ValueError(f"holds in its tools or calls what JSON cannot say: {error}") from None


def _taken(row: dict, columns: dict[str, str]) -> dict:
    """Return the row with only the columns that `columns` names, under the kind's names for them."""
    if missing := sorted(set(columns.values()) - set(row)):
        raise ValueError(f"columns names {missing[0]!r}, which is not there; the row has {', '.join(sorted(row))}")
    return {ours: row[theirs] for ours, theirs in columns.items()}


def _extras(row: dict, own: tuple[str, ...]) -> dict[str, type]:
    """Return the type of each extra column, or refuse what Arrow and a reward function cannot both hold exactly."""
    extras = {name: value for name, value in row.items() if name not in own}
    for name, value in extras.items():
        if not name:
            raise ValueError("has a column without a name. Name it")
        if name in RESERVED_COLUMNS:
            raise ValueError(f"an extra column may not be called {name!r}: the name is taken. Rename it")
        if type(value) not in _SCALARS:
            raise ValueError(f"column {name!r} must be a string, a number or true/false, not {shown(value)}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"column {name!r} holds {shown(value)}, more than 64 bits. Write it as a string")
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"column {name!r} is {value}: a reward computed from it would be no number")
    return {name: type(value) for name, value in extras.items()}
