"""Words as numbers, so that numpy can look at some in a row without making a string of each."""

import numpy as np

AT_ONCE = 500  # texts, whose letters then stay in the processor's cache
_FIRST_LETTERS = np.array([2 ** (8 * length) - 1 for length in range(9)], np.uint64)
_STIRS = np.random.default_rng(0).integers(2**64, size=8, dtype=np.uint64) | np.uint64(1)
_SPACES = bytes.maketrans(b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f", b" " * 9)  # where `str.split` parts ASCII


def lowered(text: str) -> bytes:
    """Return a text whose words are case-folded, and which no other white space than that of ASCII parts."""
    return (text.lower() if text.isascii() else " ".join(text.casefold().split())).encode()


def word_numbers(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each word, by its length and its first eight bytes, and where the word starts."""
    padded = b" %b        " % text.translate(_SPACES)  # so that each word has a space before it, and eight bytes to be read
    inside = np.frombuffer(padded, np.uint8) != ord(" ")
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    eights = np.ndarray(len(padded) - 8, "<u8", padded, offset=1, strides=(1,))
    first = eights[starts] & _FIRST_LETTERS[np.minimum(lengths, 8)]
    return first * _STIRS[-1] + lengths.astype(np.uint64), starts


def run_numbers(words: np.ndarray, at: np.ndarray, length: int) -> np.ndarray:
    """Return a number for the words that follow each other from each of these places on, at most seven."""
    numbers = np.zeros(len(at), np.uint64)
    for place in range(length):  # each word's number is stirred by those before it, so that the order of words counts
        numbers = (numbers ^ words[at + place]) * _STIRS[place]
        numbers ^= numbers >> np.uint64(32)
    return numbers
