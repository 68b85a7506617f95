"""What would fit: the largest batch, the longest sequences, and the cheapest change where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fourbit.errors import InputError
from fourbit.memory.knobs import Knobs
from fourbit.memory.plan import Plan, Planner

__all__ = ["Change", "cheapest_change", "largest", "largest_batch", "largest_length"]

MOST_BATCH = 1024
MOST_LENGTH = 131_072
"""Where the search ends for a model that does not say how many tokens it was made for."""

FEWEST_TOKENS = 64
"""Shorter sequences are not proposed."""

SMALLEST_RANK = 8
DOUBT = 0.05
"""By how much an estimate may be too high for the plan itself to be asked."""

PAGED_BUDGET_BYTES = 256 << 20
"""What a paged optimizer keeps on a GPU unless it is told otherwise."""

OFFLOADING_FROM = 2048
"""Tokens of a batch from which moving what checkpointing keeps to the host gains enough to be worth its copies."""


@dataclass(frozen=True)
class Change:
    """A set of knobs that fits, and what leads there.

    Attributes:
        flags: keys of `fourbit train` to add, as `key=value`.
        plan: with them.
    """

    flags: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        return " ".join(self.flags)


def largest(needed: Callable[[int], int], limit: int, most: int) -> int:
    """The largest number from 1 to `most` that needs no more than `limit`; 0 if 1 needs more.

    `needed` grows about in proportion, so the next number to try lies on the line through two that were.
    """
    if needed(1) > limit:
        return 0
    low, low_needed, high, high_needed = 1, needed(1), most + 1, limit + 1
    guess, tried = min(most, 8), False  # `tried` is said of `high`
    while high - low > max(1, low // 64):  # beyond 64, a part in 64 is near enough
        count = needed(guess)
        slope = (count - low_needed) / (guess - low)
        if count <= limit:
            low, low_needed = guess, count
        else:
            high, high_needed, tried = guess, count, True
        if tried:
            slope = (high_needed - low_needed) / (high - low)
        guess = low + int(min((limit - low_needed) / max(slope, 1e-9), most))
        guess = min(max(guess, low + 1), high - 1)
    return low


def largest_batch(planner: Planner, knobs: Knobs, memory_bytes: int) -> int:
    """The largest batch at the length that is given; 0 if not one sequence fits."""
    return _exactly(planner, memory_bytes, MOST_BATCH, lambda size: knobs.with_(batch_size=size))


def largest_length(planner: Planner, knobs: Knobs, memory_bytes: int) -> int:
    """The longest sequences at the batch that is given, in multiples of 64 and up to the model's own length."""
    longest = planner.longest or MOST_LENGTH
    grain = 64 if longest >= 64 else 1

    return grain * _exactly(
        planner, memory_bytes, longest // grain, lambda count: knobs.with_(sequence_length=count * grain)
    )


def _exactly(planner: Planner, memory_bytes: int, most: int, knobs: Callable[[int], Knobs]) -> int:
    """The largest number by estimates, less what it has to be less by the plan itself."""
    found = largest(lambda count: planner.estimate(knobs(count)), memory_bytes, most)
    while found and not planner.plan(knobs(found)).fits(memory_bytes):
        found -= max(1, found // 64)
    return found


def cheapest_change(planner: Planner, knobs: Knobs, memory_bytes: int) -> Change | None:
    """The change that makes a plan fit and costs the least; None if none of those known here does.

    First what leaves the result as it is and costs time, then what rounds more, then what learns less: of each kind
    alone, and where that is not enough together with all before it, without those that turn out not to be needed.
    """
    before: list[_Step] = []
    for kind in (_slower(planner, knobs, memory_bytes), _coarser(knobs), _lesser(knobs)):
        for step in kind:
            if (plan := _fitting(planner, knobs, [step], memory_bytes)) is not None:
                return Change(step.flags, plan)
        for step in kind:
            before.append(step)
            if _fitting(planner, knobs, before, memory_bytes) is not None:
                return _pruned(planner, knobs, before, memory_bytes)
    return None


@dataclass(frozen=True)
class _Step:
    flags: tuple[str, ...]
    changed: dict[str, Any]


def _fitting(planner: Planner, knobs: Knobs, steps: Sequence[_Step], memory_bytes: int) -> Plan | None:
    """The plan with these changes, if it fits."""
    for step in steps:
        knobs = knobs.with_(**step.changed)
    try:
        if planner.estimate(knobs) > memory_bytes * (1 + DOUBT):
            return None
        plan = planner.plan(knobs)
    except InputError:  # the model does not take it: no checkpointing, for one
        return None
    return plan if plan.fits(memory_bytes) else None


def _pruned(planner: Planner, knobs: Knobs, steps: Sequence[_Step], memory_bytes: int) -> Change:
    kept = list(steps)
    for step in reversed(steps):  # the dearest first
        without = [one for one in kept if one is not step]
        if _fitting(planner, knobs, without, memory_bytes) is not None:
            kept = without
    plan = _fitting(planner, knobs, kept, memory_bytes)
    assert plan is not None
    flags = {flag.partition("=")[0]: flag for step in kept for flag in step.flags}  # a later one wins
    return Change(tuple(flags.values()), plan)


def _slower(planner: Planner, knobs: Knobs, memory_bytes: int) -> list[_Step]:
    """Changes under which the same is learnt."""
    found = []
    if knobs.batch_size > 1:
        batch = max(1, _divisor(largest_batch(planner, knobs, memory_bytes), knobs.batch_size))
        steps = knobs.accumulation * knobs.batch_size // batch
        flags = (f"per_device_train_batch_size={batch}", f"gradient_accumulation_steps={steps}")
        found.append(_Step(flags, {"batch_size": batch, "accumulation": steps}))
    if not knobs.checkpointing:
        found.append(_Step(("gradient_checkpointing=true",), {"checkpointing": True}))
    on_gpu = knobs.device == "cuda"
    # Pages hold 32-bit states: they help where these are more than what stays on the device of them.
    if on_gpu and knobs.optimizer == "adamw" and 8 * planner.plan(knobs).trainable > PAGED_BUDGET_BYTES:
        paged = {"optimizer": "paged_adamw_32bit", "optimizer_budget_bytes": PAGED_BUDGET_BYTES}
        found.append(_Step(("optim=paged_adamw_32bit",), paged))
    if on_gpu and knobs.checkpointing is True and knobs.tokens >= OFFLOADING_FROM:
        found.append(_Step(("activation_offloading=true",), {"checkpointing": "offload"}))
    return found


def _coarser(knobs: Knobs) -> list[_Step]:
    """Changes that round more."""
    found = []
    if knobs.optimizer == "adamw" and knobs.device == "cpu":
        found.append(_Step(("optim=adamw_8bit",), {"optimizer": "paged_adamw_8bit"}))
    if knobs.adapter_dtype == "float32" and knobs.dtype != "float16":
        found.append(_Step(("adapter_dtype=bfloat16",), {"adapter_dtype": "bfloat16"}))
    if knobs.double_quant is False:
        found.append(_Step(("double_quant=true",), {"double_quant": True}))
    if knobs.dtype == "float32":
        found.append(_Step(("dtype=bfloat16",), {"dtype": "bfloat16"}))
    if knobs.format == "none":
        found.append(_Step(("format=nf4",), {"format": "nf4"}))
    return found


def _lesser(knobs: Knobs) -> list[_Step]:
    """Changes under which less is learnt: fewer numbers in the adapter, shorter examples."""
    ranks = [knobs.rank >> bits for bits in range(1, 12) if knobs.rank >> bits >= SMALLEST_RANK]
    lengths = [knobs.sequence_length >> bits for bits in range(1, 20) if knobs.sequence_length >> bits >= FEWEST_TOKENS]
    return [
        *(_Step((f"lora_r={rank}",), {"rank": rank}) for rank in ranks),
        *(_Step((f"max_length={length}",), {"sequence_length": length}) for length in lengths),
    ]


def _divisor(most: int, batch: int) -> int:
    """The largest number up to `most` that divides the batch, so that the same examples make a step."""
    return max((size for size in range(1, min(most, batch) + 1) if batch % size == 0), default=0)
