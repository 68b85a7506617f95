"""Advice: the largest that fits, and the cheapest change where nothing does."""

from __future__ import annotations

from typing import Any

import pytest

from fourbit.memory.advice import DOUBT, cheapest_change, largest, largest_batch, largest_length
from fourbit.memory.knobs import Knobs
from fourbit.memory.plan import Planner

KNOBS = Knobs(batch_size=4, sequence_length=512, rank=64, dropout=0.1, accumulation=4)


@pytest.mark.parametrize("limit", [0, 10, 11, 57, 100, 640, 1010, 5000, 10**6])
def test_the_largest_number_is_found(limit: int) -> None:
    def needed(count: int) -> int:
        return 10 + 10 * count + max(0, count - 20) * 7 + 2 * min(count, 9)

    exact = max((count for count in range(1, 401) if needed(count) <= limit), default=0)
    found = largest(needed, limit, 400)
    assert found <= exact
    assert exact - found <= max(0, exact // 64)


def test_few_numbers_are_tried() -> None:
    tried: list[int] = []

    def needed(count: int) -> int:
        tried.append(count)
        return 1000 + 37 * count

    assert largest(needed, 1000 + 37 * 23, 1024) == 23
    assert len(set(tried)) <= 5


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner("llama-135m", process_bytes=500_000_000)


def test_the_next_batch_does_not_fit(planner: Planner) -> None:
    memory = 2_000_000_000
    size = largest_batch(planner, KNOBS, memory)
    assert planner.plan(KNOBS.with_(batch_size=size)).fits(memory)
    assert not planner.plan(KNOBS.with_(batch_size=size + 1)).fits(memory)
    length = largest_length(planner, KNOBS, memory)
    assert length % 64 == 0
    assert planner.plan(KNOBS.with_(sequence_length=length)).fits(memory)
    assert length == 2048 or not planner.plan(KNOBS.with_(sequence_length=length + 64)).fits(memory)
    assert largest_batch(planner, KNOBS, 10**8) == 0
    assert largest_length(planner, KNOBS, 10**12) == 2048  # what the model was made for


@pytest.mark.parametrize(
    ("changes", "share", "flags"),
    [
        ({}, 0.95, ["per_device_train_batch_size=2", "gradient_accumulation_steps=8"]),
        ({"batch_size": 1, "checkpointing": False}, 0.9, ["gradient_checkpointing=true"]),
        ({"batch_size": 1, "checkpointing": True}, 0.95, ["optim=adamw_8bit"]),
    ],
    ids=str,
)
def test_the_cheapest_change_comes_first(
    planner: Planner, changes: dict[str, Any], share: float, flags: list[str]
) -> None:
    knobs = KNOBS.with_(**changes)
    memory = round(planner.plan(knobs).needed_bytes * share)
    change = cheapest_change(planner, knobs, memory)
    assert change is not None
    assert list(change.flags) == flags
    assert change.plan.fits(memory)


def test_changes_are_put_together_and_none_is_needless(planner: Planner) -> None:
    knobs = KNOBS.with_(device="cuda")
    smallest = knobs.with_(batch_size=1, accumulation=16, adapter_dtype="bfloat16")
    memory = planner.plan(smallest).needed_bytes
    change = cheapest_change(planner, knobs, memory)
    assert change is not None
    # Pages would not help: these states are smaller than what stays on the device of them.
    assert change.flags == (
        "per_device_train_batch_size=1",
        "gradient_accumulation_steps=16",
        "adapter_dtype=bfloat16",
    )
    assert change.plan.needed_bytes == memory


def test_where_no_change_is_enough_there_is_none(planner: Planner) -> None:
    assert cheapest_change(planner, KNOBS, 10**8) is None


def test_an_estimate_is_near_the_plan() -> None:
    planner = Planner("tinyllama-1.1b", process_bytes=0)
    paged = {"optimizer": "paged_adamw_32bit", "optimizer_budget_bytes": 1 << 26}
    for changes, within in (({"device": "cuda", **paged}, 0.01), ({"device": "cpu"}, DOUBT)):
        knobs = KNOBS.with_(**{"batch_size": 1, **changes})
        assert planner.estimate(knobs) == pytest.approx(planner.plan(knobs).needed_bytes, rel=within)
