"""Where a row stands for the person who has the source: its line and, where the source is several files, the file."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Places:
    """The files of a source in their order, each behind the number of rows before it; none where the source is one file."""

    files: tuple[tuple[int, str], ...] = ()

    def find(self, line: int) -> tuple[str, int]:
        """Return the file, "" where there is one, and the 1-based line in it of a line that is counted through the source."""
        at = bisect_right(self.files, line - 1, key=lambda file: file[0])
        if not at:
            return "", line
        before, name = self.files[at - 1]
        return name, line - before

    def shown(self, lines: Iterable[int]) -> tuple[int | str, ...]:
        """Return each line as it is shown: 17, or `part-2.jsonl:17`."""
        return tuple(f"{name}:{line}" if name else line for name, line in map(self.find, lines))
