"""Which pool a stage is sent to, and what is said when none can take it."""

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import MachineUnfit
from tasks.pools import Pool, choose


def pool(name: str, *tags: str, busy: int = 0, obstacle: str | None = None) -> Pool:
    return Pool(name, uuid4(), frozenset(tags), busy, obstacle)


def test_pool_must_have_every_tag():
    pools = [pool("a", "gpu"), pool("b", "gpu", "h100"), pool("c", "h100")]
    assert choose("sft", ["gpu", "h100"], pools).name == "b"


def test_pool_with_the_shortest_queue_is_taken_and_the_first_by_name_among_equals():
    pools = [pool("c", "gpu", busy=1), pool("b", "gpu", busy=1), pool("a", "gpu", busy=2)]
    assert choose("sft", ["gpu"], pools).name == "b"


def test_pool_that_cannot_take_a_job_now_is_passed_over_however_short_its_queue():
    pools = [pool("a", "gpu", obstacle="no live worker polls it"), pool("b", "gpu", busy=9)]
    assert choose("sft", ["gpu"], pools).name == "b"


def test_no_pool_fits_says_what_was_asked_what_there_is_and_what_each_lacks():
    pools = [pool("a", "gpu", "a100"), pool("b", "gpu", "h100", obstacle="is paused"), pool("c")]
    with pytest.raises(MachineUnfit) as refused:
        choose("reward_model", ["gpu", "h100"], pools)
    lines = str(refused.value).splitlines()
    assert "reward_model" in lines[0] and "[gpu, h100]" in lines[0]
    assert [line.strip() for line in lines[1:4]] == [
        "a [a100, gpu]: lacks h100",
        "b [gpu, h100]: is paused",
        "c []: lacks gpu, h100",
    ]
    assert "placement.tags" in lines[-1] and "[local]" in lines[-1]


def test_no_pool_at_all_says_how_to_make_them():
    with pytest.raises(MachineUnfit, match="prefect deploy --all"):
        choose("sft", ["gpu"], [])


TAGS = st.sets(st.sampled_from(["gpu", "h100", "a100", "spot", "nvlink"]))


@given(TAGS.filter(bool), st.lists(st.tuples(TAGS, st.integers(0, 5), st.booleans()), max_size=6))
def test_whatever_is_chosen_fits_and_nothing_that_fits_is_shorter(asked, drawn):
    pools = [
        pool(str(i), *tags, busy=busy, obstacle=None if live else "is paused") for i, (tags, busy, live) in enumerate(drawn)
    ]
    fit = [p for p in pools if asked <= p.tags and p.obstacle is None]
    if not fit:
        with pytest.raises(MachineUnfit):
            choose("sft", sorted(asked), pools)
        return
    chosen = choose("sft", sorted(asked), pools)
    assert chosen in fit and chosen.num_unfinished == min(p.num_unfinished for p in fit)
