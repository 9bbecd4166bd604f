"""Raw rows out of .jsonl, .json, .parquet, .arrow and what `datasets` saves: untouched, numbered from 0, or why not."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KIND_METADATA = b"posttrain.kind"  # marks the rows that `rows.py` made: its `row` column is ours
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_CHUNK_BYTES = 8 << 20  # of a .jsonl file: what is in memory at once


@dataclass(frozen=True)
class RawRow:
    """One row as the source has it: `value`, or the `problem` that kept it from being read."""

    number: int
    value: object = None
    problem: str | None = None
    file: str = ""  # inside a folder
    before: int = 0  # rows of the folder's files before this one

    @property
    def place(self) -> str:
        """Say where the row stands."""
        return f"{self.file}:{self.number - self.before + 1}" if self.file else f"line {self.number + 1}"


@dataclass(frozen=True)
class RawLines:
    """Lines of JSON that nobody has parsed, none of them blank: rows `number` and on of the source."""

    number: int
    lines: list[bytes]
    file: str = ""  # inside a folder
    before: int = 0

    def row(self, index: int) -> RawRow:
        """Return the row of the line at `index`, parsed."""
        return RawRow(self.number + index, *_parse(self.lines[index]), self.file, self.before)


class Unreadable(ValueError):
    """A file as a whole cannot be read; `line` is the 1-based line to look at."""

    def __init__(self, reason: str, line: int = 1):
        super().__init__(reason, line)
        self.reason, self.line = reason, line


def raw_rows(source: Path, start: int, stop: int | None) -> Iterator[RawRow | RawLines]:
    """Yield rows `start` up to `stop` of a file, or of a folder's files in the order of their names.

    The lines of a .jsonl file come many at a time and unparsed, the rows of any other one by one.
    """
    files = _files_of(source)
    first = 0
    for file in files:
        name = file.name if source.is_dir() else ""
        for number, value, problem in _readable(file):
            row, size = first + number, len(value) if isinstance(value, _Lines) else 1
            if stop is not None and row >= stop:
                return
            if row + size <= start:
                continue
            if isinstance(value, _Lines):
                begin = max(start - row, 0)
                yield RawLines(row + begin, value[begin : None if stop is None else stop - row], name, first)
            else:
                yield RawRow(row, value, problem, name, first)
        first += number + size


def _readable(file: Path) -> Iterator[tuple[int, object, str | None]]:
    try:
        yield from _READERS[file.suffix](file)
    except OSError as error:
        raise Unreadable(f"{file.name} cannot be read: {error.strerror}") from error


def _files_of(source: Path) -> list[Path]:
    if not source.exists():
        raise Unreadable("there is no such file or folder. Check the path")
    if source.is_dir():
        return _files_in(source)
    if source.suffix not in SUFFIXES:
        way_out = _from_csv(source) if source.suffix in _SEPARATORS else f"Give one of {', '.join(SUFFIXES)}"
        raise Unreadable(f"a {source.suffix or 'suffixless'} file is not read here. {way_out}")
    return [source]


def _files_in(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _named_in(folder / "dataset_dict.json", lambda said: said["splits"])
        raise Unreadable(f"the folder holds a DatasetDict. Name the folder of one split: {', '.join(splits)}")
    if (folder / "state.json").is_file():  # `Dataset.save_to_disk`, which names its files in their order
        names = _named_in(folder / "state.json", lambda said: [data["filename"] for data in said["_data_files"]])
        return [folder / name for name in names]
    visible = sorted(path for path in folder.iterdir() if path.name[0] not in "._")
    if left_out := [path.name for path in visible if _would_be_left_out(path)]:
        raise Unreadable(f"the folder also holds {left_out[0]}, which would be left out. Move it away, or unpack it here")
    files = [path for path in visible if path.suffix in SUFFIXES]
    suffixes = sorted({path.suffix for path in files})
    if not files:
        raise Unreadable(f"the folder holds no {', '.join(SUFFIXES)} file")
    if len(suffixes) > 1:
        raise Unreadable(f"the folder mixes {' and '.join(suffixes)} files. Keep rows of one dataset in one format")
    return files


_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHER_FORMATS = (".gz", ".bz2", ".xz", ".zst", ".zip", *_SEPARATORS)


def _would_be_left_out(path: Path) -> bool:
    """Tell whether rows stand there that a reader of the folder's files would never see."""
    if path.is_dir():
        return path.suffix in SUFFIXES or any(inner.suffix in SUFFIXES for inner in path.iterdir())
    return path.suffix in _OTHER_FORMATS


def _named_in(file: Path, names: Callable[[Any], list[str]]) -> list[str]:
    """Return the names that a file of `datasets` holds."""
    try:
        found = [str(name) for name in names(json.loads(file.read_text(encoding="utf-8")))]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Unreadable(f"{file.name} is not what `datasets` writes. Save the dataset anew") from error
    if file.name == "state.json" and (odd := [name for name in found if not name.endswith(".arrow")]):
        raise Unreadable(f"{file.name} names {odd[0]}, which is no .arrow file")
    return found


class _Lines(list[bytes]):
    """Consecutive lines of a .jsonl file, in the place of a value."""


def _json_lines(file: Path) -> Iterator[tuple[int, object, str | None]]:
    number = n_blank = 0
    with _named(file, "JSON Lines"), file.open("rb") as source:
        _refuse_other_text(file, source.read(_HEAD_BYTES))
        source.seek(0)
        while chunk := source.readlines(_CHUNK_BYTES):
            for is_blank, group in groupby(chunk, bytes.isspace):
                lines = _Lines(group)
                if is_blank:
                    n_blank += len(lines)
                else:
                    # harmless at the very end; between rows, line and row number would part
                    yield from ((n, None, "blank line between rows; remove it") for n in range(number - n_blank, number))
                    n_blank = 0
                    yield number, lines, None
                number += len(lines)
    _refuse_empty(number - n_blank, file)


def _refuse_other_text(file: Path, head: bytes) -> None:
    """Refuse what begins as a JSON array or as CSV does: each of its lines would be named, and none would say so."""
    _refuse_csv(file, head)
    if re.match(rb"\s*\[\s*\{", head):
        raise Unreadable(f"{file.name} holds a JSON array, and a .jsonl file holds one row per line. Name the file .json")


def _refuse_csv(file: Path, head: bytes) -> None:
    """Refuse a file that begins with a header: names with commas, semicolons or tabs between them, or one column of text."""
    first, _, rest = head.decode("utf-8-sig", errors="replace").partition("\n")
    names = _HEADER.fullmatch(first.strip())
    if names and (names["separator"] or first.strip(' "\r') in _LONE) and not rest.lstrip().startswith(("{", "[")):
        begins = first.strip()[:60]
        raise Unreadable(f"{file.name} looks like CSV (it begins with {begins!r}). {_from_csv(file, names['separator'])}")


_NAME = r'(?:\w[\w .-]{0,60}|"\w[\w .-]{0,60}")'
_HEADER = re.compile(rf"{_NAME}(?:(?P<separator>[,;\t]){_NAME}(?:(?P=separator){_NAME})*)?")
_LONE = ("text", "prompt")
_HEAD_BYTES = 4096


def _from_csv(file: Path, separator: str | None = None) -> str:
    """Say how CSV becomes JSON Lines: every value a string, none of them taken for a number or for nothing."""
    sep = separator or _SEPARATORS.get(file.suffix, ",")
    how = f"{'' if sep == ',' else f'sep={sep!r}, '}dtype=str, keep_default_na=False"
    lines = str(file.with_name(f"{file.stem}-lines.jsonl"))
    read = f"pandas.read_csv({str(file)!r}, {how})"
    write = f"to_json({lines!r}, orient='records', lines=True, force_ascii=False)"
    return f'Make lines of it: python -c "import pandas; {read}.{write}"'


def _parse(line: bytes) -> tuple[object, str | None]:
    """Return one line's value, or why it is none."""
    try:
        return _loads(line.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}. {_RECODE}"
    except json.JSONDecodeError as error:
        return None, f"invalid JSON at column {error.colno}: {error.msg}{_json_hint(line)}"
    except (ValueError, RecursionError) as error:
        return None, f"invalid JSON: {str(error)[:200]}"


_RECODE = "Save the file as UTF-8 (`iconv -t utf-8`)"


def _json_hint(line: bytes) -> str:
    if line.startswith(b"\xef\xbb\xbf"):
        return ". The file starts with a byte order mark; save it as UTF-8 without one"
    if line.strip() in (b"[", b"{"):
        return ". A .jsonl file holds one whole row per line; a JSON array belongs in a .json file"
    return ""


def _json_array(file: Path) -> Iterator[tuple[int, object, str | None]]:
    rows = _load_array(file)
    if not isinstance(rows, list):
        raise Unreadable(f"{file.name} must hold an array of rows, and holds {_json_name(rows)}")
    _refuse_empty(len(rows), file)
    yield from ((number, row, None) for number, row in enumerate(rows))


def _load_array(file: Path) -> object:
    with _named(file, "JSON"):
        data = file.read_bytes()
    _refuse_empty(len(data.strip()), file)
    _refuse_csv(file, data[:_HEAD_BYTES])
    try:
        return _loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"{file.name} is not UTF-8. {_RECODE}", data.count(b"\n", 0, error.start) + 1) from error
    except json.JSONDecodeError as error:
        hint = ". These look like JSON Lines; name the file .jsonl" if error.msg == "Extra data" else ""
        reason = f"{file.name}: invalid JSON at column {error.colno}: {error.msg}{hint}"
        raise Unreadable(reason, error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{file.name}: invalid JSON: {str(error)[:200]}") from error


def _loads(text: str) -> object:
    value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    if "\\ud" in text or "\\uD" in text:  # the one way in for half a surrogate pair, which Arrow cannot hold
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise ValueError(f"{half} is half of a surrogate pair, which is no text") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that stands twice: every JSON reader would keep one of the two texts and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _json_name(value: object) -> str:
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def _parquet(file: Path) -> Iterator[tuple[int, object, str | None]]:
    with _named(file, "Parquet"):
        table = pq.ParquetFile(file)
        _refuse_empty(table.metadata.num_rows, file)
        _refuse_twice(table.schema_arrow.names)
        ours = KIND_METADATA in (table.schema_arrow.metadata or {})
        columns = [name for name in table.schema_arrow.names if not (ours and name == "row")]
        yield from _of_batches(table.iter_batches(batch_size=2000, columns=columns))


def _arrow(file: Path) -> Iterator[tuple[int, object, str | None]]:
    """Read Arrow's stream format, which `datasets` writes, or its file format."""
    number = -1
    with _named(file, "Arrow"), pa.memory_map(str(file)) as source:
        for number, value, problem in _of_batches(_arrow_batches(source)):
            yield number, value, problem
    _refuse_empty(number + 1, file)


def _arrow_batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:
        stream = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_file(source)
        stream = (reader.get_batch(number) for number in range(reader.num_record_batches))
    for batch in stream:
        _refuse_twice(batch.schema.names)
        yield from (batch.slice(start, 2000) for start in range(0, batch.num_rows, 2000))


def _of_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, object, str | None]]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            yield number, value, None
            number += 1


def _refuse_twice(names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise Unreadable(f"the column {twice[0]!r} stands twice, and one of the two would be lost without a word")


@contextmanager
def _named(file: Path, form: str) -> Iterator[None]:
    try:
        yield
    except Unreadable:
        raise
    # of values too: dates beyond the calendar, names of time zones that do not exist, structs with a name twice
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise Unreadable(f"{file.name} is no readable {form} file: {said[:200]}") from error


def _refuse_empty(size: int, file: Path) -> None:
    if not size:
        raise Unreadable(f"{file.name} is empty: nothing would be trained, and an empty set passes every other rule")


_READERS = {".jsonl": _json_lines, ".json": _json_array, ".parquet": _parquet, ".arrow": _arrow}
