"""Near duplicates are estimated; the estimate is held against the exact Jaccard index of the same word triples."""

import random

import numpy as np
import pytest

from data_contracts.near_duplicates import band_numbers


def words(rng: random.Random, n: int) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def jaccard(one: list[str], other: list[str]) -> float:
    first, second = ({tuple(it[n : n + 3]) for n in range(len(it) - 2)} for it in (one, other))
    return len(first & second) / len(first | second)


def are_near(one: str, other: str) -> bool:
    first, second = band_numbers([one, other])
    return bool((first == second).any())


def share_found(index: float, pairs: int = 400) -> float:
    """Return how many of these pairs are found, whose second text has as many words changed as leave this index."""
    rng, found = random.Random(7), 0
    for _ in range(pairs):
        first = words(rng, 300)
        second = list(first)
        places = iter(rng.sample(range(300), 300))
        while jaccard(first, second) > index:
            second[next(places)] = "changed"
        found += are_near(" ".join(first), " ".join(second))
    return found / pairs


@pytest.mark.parametrize("index", [0.9, 0.8, 0.5])
def test_near_duplicates_are_found_as_often_as_the_bands_say(index):
    expected = 1 - (1 - index**8) ** 8
    assert share_found(index) == pytest.approx(expected, abs=0.09)


def test_text_in_another_case_and_spacing_is_near_and_another_text_is_not():
    assert are_near("Say one two three", "say  ONE two\n\u2028three")
    assert not are_near("Say one two three", "something else entirely, no doubt")


def test_texts_of_one_or_two_words_are_near_only_to_their_equals():
    texts = ["", " ", "a", "A", "b", "a b", "b a", "a  B", *(str(number) for number in range(500))]
    bands = band_numbers(texts)
    equal = {(0, 1), (2, 3), (5, 7)}
    near = {(i, j) for i in range(len(texts)) for j in range(i) if (bands[i] == bands[j]).any()}
    assert near == {(j, i) for i, j in equal}


def test_bands_of_a_text_do_not_depend_on_the_texts_beside_it():
    rng = random.Random(3)
    texts = [" ".join(words(rng, rng.randrange(40))) + rng.choice(["", "\n", " é "]) for _ in range(1200)]
    alone = np.concatenate([band_numbers([text]) for text in texts])
    assert (band_numbers(texts) == alone).all()
    assert band_numbers([]).shape == (0, 8)
