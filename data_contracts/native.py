"""Lines of JSON read by native code, where nothing about them is in doubt; `rows.py` reads the others one by one.

Two readers must agree. pydantic holds each line to the kind's strict model: it refuses what is missing, null, more, of another
type or no JSON, but of a key that stands twice it keeps the last. Arrow, which builds the columns, refuses such a key and a
column that it was not told of. Neither words a refusal: whatever one of them does not take is read again row by row.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.json
from pydantic import TypeAdapter, ValidationError

from data_contracts.kinds import Form, Kind, row_model

_LEAST_LINES = 32  # fewer are quicker read one by one than handed to Arrow
_BLOCK_BYTES = 1 << 20  # Arrow parses blocks of a chunk on several threads
_EXACT_EXTRAS = {pa.string(), pa.bool_(), pa.int64()}  # into a column of floats Arrow would take an integer

Span = tuple[int, int, pa.Table | None]


class NativeReader:
    """Reads lines that hold exactly one form of one kind of row."""

    def __init__(self, kind: Kind, form: Form, schema: pa.Schema):
        """Take the rows' schema, without the column `row`."""
        self.validate = TypeAdapter(row_model(kind, form)).validator.validate_json
        self.schema = schema
        self.how = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")

    def read(self, lines: list[bytes], begin: int = 0) -> Iterator[Span]:
        """Yield from `begin` on, in their order, the lines' spans: each a table, or None if it must be read row by row."""
        for end in [*self._doubted(lines, begin), len(lines)]:
            if begin < end:
                yield begin, end, self._table(lines[begin:end]) if end - begin >= _LEAST_LINES else None
            if end < len(lines):
                yield end, end + 1, None
            begin = end + 1

    def _doubted(self, lines: list[bytes], begin: int) -> list[int]:
        doubted = []
        for index in range(begin, len(lines)):
            try:
                self.validate(lines[index])
            except ValidationError:
                doubted.append(index)
        return doubted

    def _table(self, lines: list[bytes]) -> pa.Table | None:
        """Return the lines, each of which pydantic takes, as a table, or None if Arrow does not take them all."""
        block = max(_BLOCK_BYTES, max(map(len, lines)) + 1)
        try:
            data = pa.py_buffer(b"".join(lines))
            table = pa.json.read_json(pa.BufferReader(data), pa.json.ReadOptions(block_size=block), self.how)
        except pa.ArrowException:
            return None
        # pydantic lets an extra column be missing, which Arrow then fills with null
        is_whole = table.num_rows == len(lines) and not any(column.null_count for column in table.columns)
        return table if is_whole and table.schema.equals(self.schema) else None


def native_reader(kind: Kind, form: Form, schema: pa.Schema) -> NativeReader | None:
    """Return a reader for the rows of that schema, None if their model and Arrow's types do not say all that they must be."""
    if kind.steps:  # as many labels as steps, which no type says
        return None
    schema = schema.remove_metadata().remove(schema.get_field_index("row"))
    extras = [field for field in schema if field.name not in kind.columns(form)]
    return NativeReader(kind, form, schema) if {field.type for field in extras} <= _EXACT_EXTRAS else None
