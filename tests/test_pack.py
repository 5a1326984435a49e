"""Packing against a plain best-fit decreasing loop, and its promises on random lengths."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_nb.data.pack import fill, pack, plan_packs

lengths_in = st.integers(1, 60).flatmap(
    lambda cap: st.tuples(st.lists(st.integers(1, cap), min_size=1, max_size=120), st.just(cap)))


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The rooms left by best-fit decreasing, one sample at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [r for r in rooms if r >= length]
        room = min(fits) if fits else capacity
        if fits: rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(lengths_in, st.integers(0, 3))
def test_same_packs_as_a_plain_loop(case, seed):
    lengths, capacity = np.array(case[0]), case[1]
    for rng in (None, np.random.default_rng(seed)):
        packs = pack(lengths, capacity, rng)
        assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
        assert sorted(capacity - lengths[p].sum() for p in packs) == plain_best_fit(lengths.tolist(), capacity)


@settings(max_examples=100, deadline=None)
@given(lengths_in)
def test_file_order(case):
    lengths, capacity = np.array(case[0]), case[1]
    packs = pack(lengths, capacity)
    firsts = [p.min() for p in packs]
    assert firsts == sorted(firsts)
    again = pack(lengths, capacity)
    assert all((a == b).all() for a, b in zip(packs, again))


def test_equal_lengths_sit_in_file_order():
    packs = pack(np.array([5, 5, 5, 5]), 10)
    assert [p.tolist() for p in packs] == [[0, 1], [2, 3]]


def test_epochs_differ_in_packs_and_order_but_not_in_number():
    lengths = np.repeat([3, 4, 6, 7], 50)
    plan = plan_packs(lengths, 10)
    epochs = [plan.epoch(np.random.default_rng([7, e])) for e in range(5)]
    sets = [{frozenset(p.tolist()) for p in e} for e in epochs]
    assert all(len(e) == plan.num_packs == 100 for e in epochs)
    assert all(len(sets[0] & s) < 20 for s in sets[1:])
    assert [e[0].tolist() for e in epochs] != [epochs[0][0].tolist()] * 5


def test_same_generator_same_epoch():
    plan = plan_packs(np.arange(1, 200), 300)
    one, two = (plan.epoch(np.random.default_rng([1, 2, 3])) for _ in range(2))
    assert (one.seats == two.seats).all() and (one.order == two.order).all()


def test_the_order_is_pinned():
    """A resumed run meets the same packs whatever NumPy it has: the order comes from raw generator words."""
    epoch = plan_packs(np.array([5, 5, 5, 5, 5]), 5).epoch(np.random.default_rng([0, 0, 0]))
    assert [int(p[0]) for p in epoch] == [0, 2, 1, 3, 4]


def test_nothing_in_nothing_out():
    assert pack(np.array([], int), 10) == [] and fill([], np.array([], int), 10) == 0.0


@pytest.mark.parametrize("lengths, words", [
    ([3, 11], "sample 1 has length 11, a pack holds 10"),
    ([2, 0], "sample 1 has length 0"),
    ([[1, 2]], "shape (1, 2)")])
def test_errors(lengths, words):
    with pytest.raises(ValueError) as e: pack(np.array(lengths), 10)
    assert words in str(e.value)


@pytest.mark.parametrize("capacity", [2048, 32768])
@pytest.mark.parametrize("spread", ["flat", "chats", "all alike", "just over half"])
def test_a_million_samples_are_quick(capacity, spread):
    rng = np.random.default_rng(0)
    lengths = {"flat": rng.integers(1, capacity + 1, 1_000_000),
               "chats": np.clip(np.exp(rng.normal(6, 1, 1_000_000)).astype(int), 1, capacity),
               "all alike": np.full(1_000_000, 37),
               "just over half": rng.integers(capacity // 2, capacity // 2 + capacity // 8, 1_000_000)}[spread]
    begin = time.process_time()
    plan = plan_packs(lengths, capacity)
    plan.epoch(rng)
    took = time.process_time() - begin
    assert took < 3, f"{took:.1f} CPU s"
    if spread == "all alike": assert plan.num_packs == -(-1_000_000 // (capacity // 37))
    if spread in ("flat", "chats"): assert lengths.sum() / plan.num_packs / capacity > 0.995
