"""Checkpoints whose inputs go to the host and come back: the same bits, few of them on the device, buffers used again.

`Watched` copies for real, between two places of the host's memory, and notes the order of what a GPU would be told.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourbit.nn.offload import HostLane, OffloadedCheckpoint

LAYERS = 5
PLAIN = functools.partial(checkpoint, use_reentrant=False)


class Watched(HostLane):
    """Notes copies and waits, and poisons a target until somebody has waited for its copy, or another copy reads it:
    copies happen in their order."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.buffers = 0
        self.told: list[str] = []
        self.under_way: dict[int, tuple[Tensor, Tensor]] = {}

    def buffer(self, size_bytes: int) -> Tensor:
        self.buffers += 1
        return super().buffer(size_bytes)

    def copy(self, target: Tensor, source: Tensor) -> int:
        event = len(self.told)
        self.told.append("copy")
        for earlier, values in self.under_way.values():
            if earlier.data_ptr() == source.data_ptr():
                earlier.copy_(values)
        self.under_way[event] = target, source.clone()
        target.fill_(torch.nan)
        return event

    def wait(self, event: int, stream: None) -> None:
        self.told.append(f"wait {event}")
        target, source = self.under_way.pop(event)
        target.copy_(source)


class Lanes:
    """Gives out one watched lane, and keeps it to be looked at."""

    def __init__(self) -> None:
        self.made: list[Watched] = []

    def __call__(self, device: torch.device) -> Watched:
        self.made.append(Watched(device))
        return self.made[-1]


class Stack(nn.Module):
    """Layers with dropout, checkpointed as transformers does it."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.run = run
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.3)) for _ in range(LAYERS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.run(layer, x)
        return x


def step(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """The gradients of one training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(torch.randn(3, 16))
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_the_bits_are_those_of_plain_checkpointing() -> None:
    lanes = Lanes()
    ours = step(Stack(OffloadedCheckpoint(PLAIN, least_bytes=1, lane=lanes)))
    assert all(torch.equal(a, b) for a, b in zip(ours, step(Stack(PLAIN)), strict=True))
    (lane,) = lanes.made
    # every input goes out; all but the newest, which never left, come back
    assert lane.told.count("copy") == LAYERS + (LAYERS - 1)


def test_inputs_come_back_one_layer_ahead() -> None:
    lanes = Lanes()
    step(Stack(OffloadedCheckpoint(PLAIN, least_bytes=1, lane=lanes)))
    (lane,) = lanes.made
    told = [word.partition(" ")[0] for word in lane.told]
    out, back = told[: 2 * LAYERS - 1], told[2 * LAYERS - 1 :]
    assert out == ["copy", "wait"] * (LAYERS - 1) + ["copy"]  # the newest stays, so nobody waits for its copy
    assert back == ["copy"] + ["wait", "copy"] * (LAYERS - 2) + ["wait"]


def test_few_are_on_the_device_at_a_time() -> None:
    alive: list[int] = []
    offloaded = OffloadedCheckpoint(PLAIN, least_bytes=1, lane=HostLane)
    model = Stack(offloaded)

    def count(*_: Any) -> None:
        gc.collect()
        kept = [x for x in gc.get_objects() if type(x).__name__ == "_Kept"]
        alive.append(sum(x.here is not None for x in kept))

    for layer in model.layers:
        layer.register_forward_pre_hook(count)
    step(model)
    assert len(alive) == 2 * LAYERS
    assert max(alive) <= 2


def test_buffers_are_used_again_in_the_next_step() -> None:
    lanes = Lanes()
    model = Stack(OffloadedCheckpoint(PLAIN, least_bytes=1, lane=lanes))
    first = step(model)
    step(model, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, step(model), strict=True))
    assert lanes.made[0].buffers == LAYERS


def test_small_ones_stay() -> None:
    lanes = Lanes()
    step(Stack(OffloadedCheckpoint(PLAIN, least_bytes=3 * 16 * 4 + 1, lane=lanes)))
    assert lanes.made == []


def test_on_a_cpu_nothing_is_moved_by_default() -> None:
    model = Stack(OffloadedCheckpoint(PLAIN, least_bytes=1))
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(Stack(PLAIN)), strict=True))


def test_a_graph_that_is_kept_can_be_walked_twice() -> None:
    found = []
    for run in (PLAIN, OffloadedCheckpoint(PLAIN, least_bytes=1, lane=Lanes())):
        model = Stack(run)
        torch.manual_seed(0)
        out = model(torch.randn(3, 16)).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_step_that_is_given_up_leaves_nothing_under_way() -> None:
    lanes = Lanes()
    model = Stack(OffloadedCheckpoint(PLAIN, least_bytes=1, lane=lanes))

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = model.layers[1].register_full_backward_hook(fail)
    with pytest.raises(MemoryError):
        step(model)
    hook.remove()
    gc.collect()
    (lane,) = lanes.made
    on_their_way_back = [word for word in lane.told[2 * LAYERS - 1 :] if word == "copy"]
    waited_for = [word for word in lane.told[2 * LAYERS - 1 :] if word != "copy"]
    assert len(on_their_way_back) == len(waited_for) > 0
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(Stack(PLAIN)), strict=True))
    assert lane.buffers == LAYERS


def test_an_input_that_was_changed_in_place_is_noticed() -> None:
    class Rude(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            with torch.no_grad():
                x.add_(1)
            return y

    offloaded = OffloadedCheckpoint(PLAIN, least_bytes=1, lane=HostLane)
    x = torch.randn(3, 16, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="in place"):
        offloaded(Rude(), x).sum().backward()


def test_a_copy_begins_with_empty_buffers() -> None:
    offloaded = OffloadedCheckpoint(PLAIN, least_bytes=1, lane=HostLane)
    model = Stack(offloaded)
    step(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.run is not offloaded
        assert again.run.least_bytes == 1
        assert all(torch.equal(a, b) for a, b in zip(step(again), step(model), strict=True))
