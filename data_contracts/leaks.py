"""What a training row repeats of the prompts that are held out: a whole one, one turn, or 13 words in a row."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

PASSAGE_WORDS = 13
# Of whatever 13 words in a row, one of the first seven is at a multiple of 7 in the text, and the six after it are still among
# the 13. So a text is first searched for such sevens only, by a number made of their words.
_SEVEN = 7
_PLACES = np.random.default_rng(0).integers(2**64, size=_SEVEN + 1, dtype=np.uint64) | np.uint64(1)
_FIRST_LETTERS = np.array([2 ** (8 * length) - 1 for length in range(9)], np.uint64)
_BITS = 24
_AT_ONCE = 500  # texts, whose letters then stay in the processor's cache
_SPACES = bytes.maketrans(b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f", b" " * 9)  # where `str.split` parts ASCII


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
        return [found for start in range(0, len(texts), _AT_ONCE) for found in self._quoted(texts[start : start + _AT_ONCE])]

    def _quoted(self, texts: list[str]) -> list[bool]:
        suspects = set(self._suspects(texts))
        return [
            number in suspects and not self.passages.isdisjoint(_windows(text.casefold().split()))
            for number, text in enumerate(texts)
        ]

    def _suspects(self, texts: list[str]) -> list[int]:
        """Return the texts with seven words of some passage: all that quote one, and hardly any other."""
        levelled = [_lower(text).encode() for text in texts]
        words, starts = _word_numbers(b" ".join(levelled))
        at = np.arange(0, len(words) - _SEVEN + 1, _SEVEN)
        sevens = _sevens(words, at)
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
        words, _ = _word_numbers(" ".join(self.passages).encode())
        firsts = np.arange(0, len(words), PASSAGE_WORDS)
        known = np.unique(_sevens(words, (firsts[:, None] + np.arange(_SEVEN)).ravel()))
        table = np.zeros(2**_BITS, bool)
        table[known >> np.uint64(64 - _BITS)] = True
        return known, table


def passages_of(prompts: Iterable[str]) -> frozenset[str]:
    """Return every passage that only one of these prompts has."""
    counts = Counter(passage for prompt in set(prompts) for passage in _windows(prompt.casefold().split()))
    return frozenset(passage for passage, count in counts.items() if count == 1)


def hash_of(text: str) -> str:
    """Return 16 hexadecimal digits of a text's case-folded words."""
    return hashlib.blake2b(_levelled(text).encode(), digest_size=8).hexdigest()


def _levelled(text: str) -> str:
    """Return the case-folded words of a text, one space apart."""
    if text.isascii() and text.isprintable() and "  " not in text:  # the same, seven times as fast
        return text.lower().strip()
    return " ".join(text.casefold().split())


def _lower(text: str) -> str:
    """Return a text whose words are case-folded, and which no other white space than that of ASCII parts."""
    return text.lower() if text.isascii() else " ".join(text.casefold().split())


def _windows(words: Sequence[str]) -> set[str]:
    return {" ".join(words[start : start + PASSAGE_WORDS]) for start in range(len(words) - PASSAGE_WORDS + 1)}


def _word_numbers(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each word, by its length and its first eight bytes, and where the word starts."""
    padded = b" %b        " % text.translate(_SPACES)  # so that each word has a space before it, and eight bytes to be read
    inside = np.frombuffer(padded, np.uint8) != ord(" ")
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    eights = np.ndarray(len(padded) - 8, "<u8", padded, offset=1, strides=(1,))
    first = eights[starts] & _FIRST_LETTERS[np.minimum(lengths, 8)]
    return first * _PLACES[_SEVEN] + lengths.astype(np.uint64), starts


def _sevens(words: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return a number for the seven words from each of these places on."""
    numbers = np.zeros(len(at), np.uint64)
    for place in range(_SEVEN):  # each word's number is stirred by those before it, so that the order of words counts
        numbers = (numbers ^ words[at + place]) * _PLACES[place]
        numbers ^= numbers >> np.uint64(32)
    return numbers
