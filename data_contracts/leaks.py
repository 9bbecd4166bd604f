"""What a training row repeats of the prompts that are held out: a whole one, one turn, or 13 words in a row."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from data_contracts.words import lowered, run_numbers, some_at_once, word_numbers

PASSAGE_WORDS = 13
# Of whatever 13 words in a row, one of the first seven is at a multiple of 7 in the text, and the six after it are still among
# the 13. So a text is first searched for such sevens only, by a number made of their words.
_SEVEN = 7
_BITS = 24


class Leaks:
    """Finds in texts what is held out: the hashes of prompts, and passages that only one of them has."""

    def __init__(self, prompts: Iterable[str] = (), passages: Iterable[str] = ()):
        self.prompts, self.passages = frozenset(prompts), frozenset(passages)

    def overlaps(self, prompts: list[str], hashes: list[str], turns: list[list[str]]) -> list[bool]:
        """Tell for each row whether its prompt, or any one of its user turns, is held out."""
        if not self.prompts:
            return [False] * len(prompts)
        return [
            whole in self.prompts or any(turn != prompt and hash_of(turn) in self.prompts for turn in each)
            for prompt, whole, each in zip(prompts, hashes, turns, strict=True)
        ]

    def quotes(self, texts: list[str]) -> list[bool]:
        """Tell for each text whether one of the passages stands in it."""
        if not self.passages:
            return [False] * len(texts)
        return [found for some in some_at_once(texts) for found in self._quoted(some)]

    def _quoted(self, texts: list[str]) -> list[bool]:
        suspects = set(self._suspects(texts))
        return [
            number in suspects and not self.passages.isdisjoint(windows(text.casefold().split()))
            for number, text in enumerate(texts)
        ]

    def _suspects(self, texts: list[str]) -> list[int]:
        """Return the texts with seven words of some passage: all that quote one, and hardly any other."""
        levelled = [lowered(text) for text in texts]
        words, starts = word_numbers(b" ".join(levelled))
        at = np.arange(0, len(words) - _SEVEN + 1, _SEVEN)
        sevens = run_numbers([words[at + place] for place in range(_SEVEN)])
        known, table = self._known
        found = np.flatnonzero(table[sevens >> np.uint64(64 - _BITS)])  # hardly any: cheaper than a search for each
        nearest = np.minimum(np.searchsorted(known, sevens[found]), len(known) - 1)
        found = found[known[nearest] == sevens[found]]
        ends = np.cumsum([len(text) + 1 for text in levelled])
        return np.unique(np.searchsorted(ends, starts[at[found]], side="right")).tolist()

    @cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of all sevens that a passage begins with or that begin among its first seven words.

        With them comes a table of whether there is one with those first bits.
        """
        words, _ = word_numbers(" ".join(self.passages).encode())
        firsts = np.arange(0, len(words), PASSAGE_WORDS)
        begins = (firsts[:, None] + np.arange(_SEVEN)).ravel()
        known = np.unique(run_numbers([words[begins + place] for place in range(_SEVEN)]))
        table = np.zeros(2**_BITS, bool)
        table[known >> np.uint64(64 - _BITS)] = True
        return known, table


def passages_of(prompts: Iterable[str]) -> frozenset[str]:
    """Return every passage that only one of these prompts has."""
    counts = Counter(passage for prompt in set(prompts) for passage in windows(prompt.casefold().split()))
    return frozenset(passage for passage, count in counts.items() if count == 1)


def hash_of(text: str) -> str:
    """Return 16 hexadecimal digits of a text's case-folded words."""
    return hashlib.blake2b(_levelled(text).encode(), digest_size=8).hexdigest()


def _levelled(text: str) -> str:
    """Return the case-folded words of a text, one space apart."""
    if text.isascii() and text.isprintable() and "  " not in text:  # the same, seven times as fast
        return text.lower().strip()
    return " ".join(text.casefold().split())


def windows(words: Sequence[str]) -> set[str]:
    """Return every passage of these words."""
    return {" ".join(words[start : start + PASSAGE_WORDS]) for start in range(len(words) - PASSAGE_WORDS + 1)}
