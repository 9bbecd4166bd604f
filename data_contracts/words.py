"""Words as numbers, so that numpy can look at some in a row without making a string of each."""

from collections.abc import Iterator, Sequence

import numpy as np

CHARS_AT_ONCE = 80_000  # arrays of their words stay in the processor's cache, and are too small to be memory of their own
_FIRST_LETTERS = np.array([2 ** (8 * length) - 1 for length in range(9)], np.uint64)
_STIRS = np.random.default_rng(0).integers(2**64, size=8, dtype=np.uint64) | np.uint64(1)
_SPACES = [bytes([code]) for code in b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f"]  # where `str.split` parts ASCII, besides " "


def some_at_once(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in their order, as many at once as are quickly looked at together."""
    start = chars = 0
    for end, text in enumerate(texts, start=1):
        chars += len(text)
        if chars >= CHARS_AT_ONCE or end == len(texts):
            yield texts[start:end]
            start, chars = end, 0


def lowered(text: str) -> bytes:
    """Return the case-folded words of a text, with spaces between them and no other white space."""
    if not text.isascii():
        return " ".join(text.casefold().split()).encode()
    words = text.lower().encode()
    for space in _SPACES:  # quicker than a table of all bytes
        words = words.replace(space, b" ")
    return words


def word_numbers(words: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each word, by its length and its first eight bytes, and where the word starts."""
    padded = words + b" " * (16 + -len(words) % 8)  # so that eight bytes can be read of each word, and all of them by eights
    ends = np.flatnonzero(np.frombuffer(padded, np.uint8, len(words) + 1) == ord(" "))
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts
    if not lengths.all():  # where spaces follow each other
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    eights, at, bits = np.frombuffer(padded, "<u8"), starts >> 3, ((starts & 7) << 3).astype(np.uint64)
    first = eights[at] >> bits | eights[at + 1] << (np.uint64(64) - bits)  # half the time of reading where a word starts
    first &= _FIRST_LETTERS.take(lengths, mode="clip")
    return first * _STIRS[-1] + lengths.astype(np.uint64), starts


def run_numbers(words: Sequence[np.ndarray]) -> np.ndarray:
    """Return a number for each run of words: the first, the second and so on of all runs are given, at most seven."""
    numbers = np.zeros(len(words[0]), np.uint64)
    for stir, each in zip(_STIRS, words, strict=False):  # each is stirred by those before it, so that their order counts
        numbers ^= each
        numbers *= stir
        numbers ^= numbers >> np.uint64(32)
    return numbers
