"""The heap: what it gives again at once, what only later, and how far it grows."""

from __future__ import annotations

from fourbit.memory.heap import ALIGNING, HEADER, SETTLING, Heap, Step, high_water

MB = 1 << 20
EACH = MB + HEADER + ALIGNING


def test_it_grows_by_what_is_taken() -> None:
    heap = Heap()
    for name in range(3):
        heap.take(name, MB)
    assert heap.most == 3 * EACH
    assert sorted(map(int, heap.names())) == [0, 1, 2]  # type: ignore[call-overload]


def test_what_is_at_the_top_goes_back_to_it() -> None:
    heap = Heap()
    heap.take("a", MB)
    for index in range(2 * SETTLING):
        heap.take(index, 64)
        heap.give_back(index)
    heap.give_back("a")
    heap.take("b", 2 * MB)
    assert heap.most < 4 * MB


def test_a_hole_is_too_short_for_its_own_size_until_its_end_is_free() -> None:
    heap = Heap()
    heap.take("hole", MB)
    heap.take("wall", MB)
    heap.give_back("hole")
    heap.take("again", MB)
    assert heap.most == 3 * EACH

    heap = Heap()
    heap.take("hole", MB)
    heap.take("wall", MB)
    heap.give_back("hole")
    for index in range(SETTLING):
        heap.take(index, 64)
    before = heap.most
    heap.take("again", MB // 2)  # the small ones lie in the hole as well
    assert heap.most == before < 3 * EACH


def test_neighbours_become_one_hole() -> None:
    heap = Heap()
    for name in ("a", "b", "c", "wall"):
        heap.take(name, MB)
    for name in ("a", "b", "c"):
        heap.give_back(name)
    for index in range(SETTLING):
        heap.take(("small", index), 64)
    before = heap.most
    heap.take("wide", 2 * MB)
    assert heap.most == before


def test_states_and_gradients_are_played() -> None:
    step = Step(events=[(1, MB), (2, MB), (1, -MB), (3, MB)], kept=[3], gradients=[2])
    alone = high_water(step, passes=1, states=[])
    assert 3 * MB < alone < 6 * MB  # three at once, and two that find their holes too short
    with_states = high_water(step, passes=1, states=[8 * MB])
    assert 8 * MB <= with_states - alone < 9 * MB
    # A second pass meets the gradients of the first, and the kept buffer is taken once.
    assert alone <= high_water(step, passes=2, states=[]) < alone + 3 * MB
