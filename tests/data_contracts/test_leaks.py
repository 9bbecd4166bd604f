"""A search that skips most words finds what a search at every word finds."""

import hashlib

from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_contracts import words
from data_contracts.leaks import Leaks, hash_of, passages_of

_WORDS = st.sampled_from(
    ["a", "B", "b", "straße", "STRASSE", "İ", "é", "internationally", "internationalism", "٣", "\x00", "\x85x"]
)
_SPACES = st.sampled_from([" ", " ", "  ", "\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\u00a0", "\u2003", "\u3000"])
_TEXTS = st.lists(st.tuples(_WORDS, _SPACES), max_size=60).map(lambda parts: "".join(map("".join, parts)))


def windows(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}


@settings(max_examples=300, deadline=None)
@given(prompts=st.lists(_TEXTS, max_size=4), around=st.lists(st.tuples(_TEXTS, _TEXTS), max_size=6), data=st.data())
def test_texts_that_quote_a_passage_are_those_a_plain_search_finds(prompts, around, data):
    quoted = st.sampled_from([*prompts, ""])
    texts = [before + data.draw(_SPACES) + data.draw(quoted).upper() + " " + after for before, after in around]
    passages = passages_of(prompts)
    wanted = {tuple(passage.split(" ")) for passage in passages}
    assert Leaks((), passages).quotes(texts) == [bool(windows(text) & wanted) for text in texts]


def test_passage_is_found_wherever_it_stands_among_many_texts():
    prompt = " ".join(f"w{n}" for n in range(13))
    times = words.CHARS_AT_ONCE // 500  # some groups of texts that are looked at together
    texts = [f"{'x ' * n}{prompt}{' y' * (20 - n)}" if n % 2 else "x y z " * n for n in range(20)] * times
    assert Leaks((), passages_of([prompt])).quotes(texts) == [n % 2 == 1 for n in range(20)] * times


@given(text=_TEXTS | st.text())
@example("  A  b\n")
@example("a ")
def test_prompt_hash_is_of_the_case_folded_words_one_space_apart(text):
    levelled = " ".join(text.casefold().split())
    assert hash_of(text) == hashlib.blake2b(levelled.encode(), digest_size=8).hexdigest()
