"""Near duplicates are estimated; the estimate is held against the exact Jaccard index of the same word triples."""

import random

import pytest

from data_contracts.near_duplicates import NearDuplicates


def words(rng: random.Random, n: int) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def jaccard(one: list[str], other: list[str]) -> float:
    first, second = ({tuple(it[n : n + 3]) for n in range(len(it) - 2)} for it in (one, other))
    return len(first & second) / len(first | second)


def share_found(index: float, pairs: int = 400) -> float:
    """Return how many of these pairs are found, whose second text has as many words changed as leave this index."""
    rng, found = random.Random(7), 0
    for _ in range(pairs):
        seen, first = NearDuplicates(), words(rng, 300)
        second = list(first)
        places = iter(rng.sample(range(300), 300))
        while jaccard(first, second) > index:
            second[next(places)] = "changed"
        assert not seen.repeats(" ".join(first))
        found += seen.repeats(" ".join(second))
    return found / pairs


@pytest.mark.parametrize("index", [0.9, 0.8, 0.5])
def test_near_duplicates_are_found_as_often_as_the_bands_say(index):
    expected = 1 - (1 - index**8) ** 8
    assert share_found(index) == pytest.approx(expected, abs=0.09)


def test_text_in_another_case_and_spacing_is_a_duplicate_and_another_text_is_none():
    seen = NearDuplicates()
    told = [
        seen.repeats(text)
        for text in ("Say one two three", "say  ONE two\nthree", "something else entirely, no doubt", "a", "b", "A")
    ]
    assert told == [False, True, False, False, False, True]


def test_texts_of_one_word_are_near_only_to_their_equals():
    seen = NearDuplicates()
    assert not any(seen.repeats(str(number)) for number in range(500))
