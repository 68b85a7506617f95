"""One training step with tensors that hold nothing, and an account of every byte they would take.

torch runs the forward and the backward pass of a `Blueprint`: its autograd decides what is kept, checkpointing what is
computed again, the shapes what it takes. A dispatch mode writes down when the memory of each result comes and goes.
What the operations hold inside is counted beside it (`workspaces`).

The account is of the allocator's live bytes: what a GPU's `max_memory_allocated` sees. It costs about a second for a
model of 32 layers, whatever their width.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit.errors import InputError
from fourbit.memory.blueprint import Blueprint
from fourbit.memory.heap import Step
from fourbit.memory.knobs import Knobs
from fourbit.memory.workspaces import workspace_of
from fourbit.nn.offload import HostLane, OffloadedCheckpoint

__all__ = ["Peak", "rehearse"]

ALLOCATION = {"cpu": 64, "cuda": 512}
"""Bytes that an allocation of torch's is rounded up to a multiple of."""


@dataclass(frozen=True)
class Peak:
    """What a step holds beside weights and states when it holds the most.

    Attributes:
        activations: what the forward pass left for the backward pass, and what is being computed.
        gradients: of the adapters.
        logits, workspace: inside of the operation that the peak is in, the chunked loss or any other; on a CPU what
            they keep for good.
        host: pinned memory of the host that activations were moved to.
        operation: what ran at the peak.
        step: the allocations in their order.
    """

    activations: int
    gradients: int
    logits: int
    workspace: int
    host: int
    operation: str
    step: Step

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.activations + self.gradients + self.logits + self.workspace


def rehearse(blueprint: Blueprint, knobs: Knobs) -> Peak:
    """Run a step of fake tensors.

    Raises:
        InputError: the model does something in which sizes depend on values, so that nothing can be told.
    """
    account = _Account(knobs)
    model = blueprint.model
    account.know(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(blueprint.mode)
        stack.enter_context(_offloading(model, account, knobs))
        ids = torch.zeros((knobs.batch_size, knobs.sequence_length), dtype=torch.int64)
        try:
            with account:
                if knobs.accumulation > 1:
                    for parameter in trained:
                        parameter.grad = torch.empty_like(parameter)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                account.stage = "backward"
                loss.backward()
        except (torch._subclasses.fake_tensor.DataDependentOutputException, RuntimeError, NotImplementedError) as error:
            name = type(model.get_base_model()).__name__  # type: ignore[operator]
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"A step of a {name} cannot be planned: {reason or type(error).__name__}") from error
        peak = account.peak([parameter.grad for parameter in trained if parameter.grad is not None])
        for parameter in trained:
            parameter.grad = None
    return peak


@dataclass
class _Account(TorchDispatchMode):
    """Notes allocations; see the module's head.

    Attributes:
        stage: "forward" or "backward".
        elsewhere: above 0 while memory of the host is allocated.
    """

    knobs: Knobs
    stage: str = "forward"
    elsewhere: int = 0
    now: int = 0
    most: int = 0
    host: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    _alive: dict[int, tuple[int, Any]] = field(default_factory=dict)
    _events: list[tuple[int, int]] = field(default_factory=list)
    _buffers: dict[str, int] = field(default_factory=dict)
    _passing: set[int] = field(default_factory=set)
    _number: int = 0
    _at: int = 0
    _inside: tuple[str, int] = ("", 0)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def know(self, model: nn.Module) -> None:
        """Take what a model holds as counted already."""
        for module in model.modules():
            values = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            for tensor in values:
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    self._alive[storage._cdata] = 0, storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor):
                self._note(one)
        inside, name = 0, func.name()
        if name.startswith("fourbit::"):
            inside = self._look_inside(name.removeprefix("fourbit::").partition(".")[0], args)
        if self.now + inside > self.most:
            self.most, self._at, self._inside = self.now + inside, len(self._events), (name, inside)
        return result

    def _look_inside(self, name: str, arguments: tuple[Any, ...]) -> int:
        """Count what an operation keeps; what it holds while it runs."""
        workspace = workspace_of(name, arguments, self.knobs)
        for buffer, size_bytes in workspace.kept.items():
            if size_bytes > self.kept.get(buffer, 0):
                self.kept[buffer] = size_bytes
                self._number += 1
                self._buffers[buffer] = self._number
                self._events.append((self._number, size_bytes))
        if workspace.transient:
            self._number += 1
            self._passing.add(self._number)
            self._events += [(self._number, workspace.transient), (self._number, -workspace.transient)]
        return workspace.transient

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        grain = ALLOCATION[self.knobs.device]
        size_bytes = -(-storage.nbytes() // grain) * grain
        if self.elsewhere:
            self.host += storage.nbytes()
            size_bytes = 0
        self._number += 1  # an address is used again
        number = self._number
        self._alive[key] = number, weakref.ref(storage, lambda _: self._forget(key, number, size_bytes))
        self._change(number, size_bytes)

    def _forget(self, key: int, number: int, size_bytes: int) -> None:
        self._alive.pop(key, None)
        self._change(number, -size_bytes)

    def _change(self, number: int, size_bytes: int) -> None:
        self.now += size_bytes
        self._events.append((number, size_bytes))

    def peak(self, left: list[Tensor]) -> Peak:
        """What was alive when the most was.

        Args:
            left: the gradients.
        """
        gradients = {self._alive[one.untyped_storage()._cdata][0] for one in left}
        alive: dict[int, int] = {}
        apart = {*self._buffers.values(), *self._passing}
        for number, size_bytes in self._events[: self._at]:
            if number in apart:
                continue
            if size_bytes < 0:
                alive.pop(number, None)
            elif size_bytes:
                alive[number] = size_bytes
        of_gradients = sum(size_bytes for number, size_bytes in alive.items() if number in gradients)
        name, inside = self._inside
        logits = inside if "cross_entropy" in name else 0
        return Peak(
            activations=sum(alive.values()) - of_gradients,
            gradients=of_gradients,
            logits=logits + self.kept.get("logits", 0),
            workspace=inside - logits + sum(size for name, size in self.kept.items() if name != "logits"),
            host=self.host,
            operation=name.removesuffix(".default"),
            step=Step(self._events, self._buffers.values(), gradients),
        )


class _Lane(HostLane):
    """Memory of the host that activations are moved to, which is counted apart."""

    account: _Account

    def buffer(self, size_bytes: int) -> Tensor:
        """See `HostLane`."""
        self.account.elsewhere += 1
        try:
            return super().buffer(size_bytes)
        finally:
            self.account.elsewhere -= 1


@contextmanager
def _offloading(model: nn.Module, account: _Account, knobs: Knobs) -> Iterator[None]:
    """Let checkpoints move what they keep, where the knobs ask for it; on a CPU it is in the host's memory anyway."""
    if knobs.checkpointing != "offload" or knobs.device == "cpu":
        yield
        return

    def lane(device: torch.device) -> _Lane:
        made = _Lane(device)
        made.account = account
        return made

    changed = [module for module in model.modules() if "_gradient_checkpointing_func" in module.__dict__]
    before = [module._gradient_checkpointing_func for module in changed]
    moving: dict[int, OffloadedCheckpoint] = {}
    for module, own in zip(changed, before, strict=True):
        module._gradient_checkpointing_func = moving.setdefault(id(own), OffloadedCheckpoint(own, lane=lane))  # type: ignore[assignment, arg-type]
    try:
        yield
    finally:
        for module, own in zip(changed, before, strict=True):
            module._gradient_checkpointing_func = own
