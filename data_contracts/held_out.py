"""What is held out of training: what is looked for in training rows, and which held-out row it is of where it is found."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.batch_facts import as_messages, asked_texts, user_turns, whole_texts
from data_contracts.canonical import RowsFile, batches_of
from data_contracts.kinds import kind_of
from data_contracts.leaks import hash_of, passages_of, windows
from data_contracts.reasons import shortened

LEAKS = ("overlaps_eval", "quotes_eval")  # the facts that say a row repeats some of it
_SHOWN_CHARS = 60


@dataclass(frozen=True)
class HeldOut:
    """What no training row may repeat: the hashes of the evaluation's prompts, and the passages of each alone."""

    prompts: frozenset[str]
    passages: frozenset[str]
    texts: dict[int, str] = field(default_factory=dict, repr=False)  # the prompts themselves, by the line of each

    @classmethod
    def of(cls, rows: pa.Table | RowsFile, kind: str) -> "HeldOut":
        asked = kind_of(kind)
        texts: dict[int, str] = {}
        for batch in batches_of(rows):
            lines = (row + 1 for row in batch["row"].to_pylist())
            texts |= zip(lines, asked_texts(as_messages(batch, asked)), strict=True)
        return cls(frozenset(map(hash_of, texts.values())), passages_of(texts.values()), texts)

    def found_in(self, rows: RowsFile, kind: str, numbers: Iterable[int]) -> dict[int, str]:
        """Return what each of the rows of these numbers repeats, by its number; not those that repeat nothing."""
        wanted = pa.array(sorted(set(numbers)), pa.int64())
        if not len(wanted):
            return {}
        found: dict[int, str] = {}
        for batch in rows.batches():
            among = batch.filter(pc.is_in(batch["row"], wanted))
            if among.num_rows:
                found |= self._repeated(as_messages(among, kind_of(kind)), kind)
        return found

    def _repeated(self, rows: pl.DataFrame, kind: str) -> dict[int, str]:
        texts = zip(rows["row"], asked_texts(rows), user_turns(rows), whole_texts(rows, kind_of(kind)), strict=True)
        lines = ((row, self._line(asked, turns, whole)) for row, asked, turns, whole in texts)
        return {
            row: f"repeats held-out row {line}: {shortened(self.texts[line], _SHOWN_CHARS)!r}" for row, line in lines if line
        }

    def _line(self, asked: str, turns: list[str], whole: str) -> int | None:
        """Return the line of the held-out prompt that is asked, or whose passage stands in the whole text."""
        asked_lines = (self._by_hash.get(hash_of(text)) for text in (asked, *turns))
        quoted = (self._by_passage[it] for it in windows(whole.casefold().split()) if it in self.passages)
        return next((line for line in asked_lines if line), None) or min(quoted, default=None)

    @cached_property
    def _by_hash(self) -> dict[str, int]:
        return {hash_of(text): line for line, text in reversed(self.texts.items())}  # of equal ones the first

    @cached_property
    def _by_passage(self) -> dict[str, int]:
        return {passage: line for line, text in reversed(self.texts.items()) for passage in windows(text.casefold().split())}
