"""Rows on disk, as every later step takes them: zstd Parquet of one pinned schema, written and read a row group at a time."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.places import Places

GROUP_ROWS = 10_000
_GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class RowsFile:
    """A file that `RowsWriter` wrote. It knows its kind: `sources.KIND_METADATA` of the schema."""

    path: Path
    schema: pa.Schema
    num_rows: int
    places: Places = Places()  # of the rows in their source, until the file is left to itself

    @classmethod
    def at(cls, path: Path) -> "RowsFile":
        """Return the file that was written there."""
        with pq.ParquetFile(path) as file:
            return cls(path, file.schema_arrow, file.metadata.num_rows)

    def batches(self) -> Iterator[pa.Table]:
        """Yield the rows in their order, up to 10,000 at a time."""
        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):  # whose bytes are bounded, where this wrote them
                for batch in file.iter_batches(GROUP_ROWS, row_groups=[group]):
                    yield pa.Table.from_batches([batch], schema=self.schema)

    def table(self) -> pa.Table:
        """Return all rows, in memory."""
        return pq.read_table(self.path)


class RowsWriter:
    """Writes tables of one schema into a Parquet file; leaves none behind if its block raises, or if there was no row.

    A row group has at most 10,000 rows, and little more than 32 MB. One is compressed on a thread of its own while the next
    is read.
    """

    def __init__(self, path: Path):
        self.path, self.num_rows = path, 0
        self.pending: list[pa.Table] = []
        self.writer: pq.ParquetWriter | None = None
        self.under_way: Future[None] | None = None

    def __enter__(self) -> "RowsWriter":
        self.thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, type_: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_whole = False
        try:
            if error is None:
                self._write()
                self._wait()
                self._close()
                is_whole = True
        finally:
            self.thread.shutdown()
            if not is_whole:
                with suppress(OSError):  # a full disk has been told of already
                    self._close()
                self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, table: pa.Table) -> None:
        """Write a table after those before it; what fails on disk may be raised by a later call."""
        self.pending.append(table)
        if sum(it.num_rows for it in self.pending) >= GROUP_ROWS or sum(it.nbytes for it in self.pending) >= _GROUP_BYTES:
            self._write()

    def written(self) -> RowsFile:
        """Return the file, once the block is left."""
        return RowsFile(self.path, self.writer.schema, self.num_rows)

    def _write(self) -> None:
        if not self.pending:
            return
        group, self.pending = pa.concat_tables(self.pending), []
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, group.schema, compression="zstd")
        self._wait()
        self.under_way = self.thread.submit(self.writer.write_table, group, GROUP_ROWS)
        self.num_rows += group.num_rows

    def _wait(self) -> None:
        if self.under_way is not None:
            self.under_way.result()
            self.under_way = None


def batches_of(rows: pa.Table | RowsFile) -> Iterator[pa.Table]:
    """Yield the rows in their order, up to 10,000 at a time, and an empty table as it is."""
    if isinstance(rows, RowsFile):
        yield from rows.batches()
    else:
        yield from (rows.slice(start, GROUP_ROWS) for start in range(0, max(1, rows.num_rows), GROUP_ROWS))
