"""Gradient checkpointing that keeps the inputs of the layers in the host's memory.

Checkpointing keeps one tensor per layer: what the layer was given. With long sequences these are the largest thing on a
device (layers x tokens x hidden). Here each is copied to pinned host memory while the device computes the next layer,
and copied back while it computes the layer after it backward. The copies are explicit, on a stream of their own, and
bit for bit; nothing is left to managed memory.

How the two streams meet, so that no copy reads what is not written yet, or writes what is still in use:

- out: the copying stream waits for what is queued on the computing one, then copies. The newest input stays on the
  device as well, since the backward pass begins with it. Once the next one comes, the computing stream waits for the
  copy of the one before and lets go of it: no more than two are on the device, and if the bus is slower than the
  device, the device waits instead of running out of memory.
- back: the target is allocated on the computing stream, so the copying one waits for that stream before it writes, and
  the computing one waits for the copy before it reads. It is asked for one layer ahead.
- a host buffer is written and read by the copying stream only, in the order of its use, and so can be used again as
  soon as nobody holds it.

torch.compile traces checkpointing by itself, without the hooks that this needs: compiled layers are not offloaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import InputError

__all__ = ["HostLane", "OffloadedCheckpoint", "StreamLane"]


class StreamLane:
    """Copies between a CUDA device and pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def buffer(self, size_bytes: int) -> Tensor:
        """Host memory that can be copied to without the processor.

        Raises:
            InputError: the system does not give so much.
        """
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise InputError(
                f"The system gives no {size_bytes / 1e6:.0f} MB more of pinned memory to offload activations to; turn"
                " the offloading off, or take a smaller batch or shorter sequences."
            ) from error

    def computing(self) -> torch.cuda.Stream:
        """The stream that the caller computes on."""
        return torch.cuda.current_stream(self._side.device)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy once everything is done that was queued; the event is reached when it is over."""
        self._side.wait_stream(self.computing())
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._side.record_event()
        return event

    def wait(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        """Let a computing stream go on only after an event."""
        stream.wait_event(event)


class HostLane:
    """The same between two places of the host's memory, at once: the logic can be tried where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        del device

    def buffer(self, size_bytes: int) -> Tensor:
        """Memory to copy to."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def computing(self) -> None:
        """There are no streams."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy, at once."""
        target.copy_(source)

    def wait(self, event: None, stream: None) -> None:
        """Nothing is under way."""


class _Kept:
    """One tensor that the backward pass will ask for.

    Attributes:
        here: it, while it is on the device, or on its way back.
        before: the one that was kept before it, which the backward pass asks for next.
    """

    def __init__(self, x: Tensor, lane: Any, free: list[Tensor], before: _Kept | None) -> None:
        self._like, self._lane, self._free = (x.shape, x.dtype, x.device), lane, free
        self._buffer = free.pop() if free else lane.buffer(x.nbytes)
        self.here: Tensor | None = x
        self.before = None if before is None else weakref.ref(before)
        self._copied, self._version = lane.copy(self._host(), x), x._version
        self._returning: tuple[Any, Any] | None = None

    def _host(self) -> Tensor:
        shape, dtype, _ = self._like
        return self._buffer.view(dtype).view(shape)

    def leave(self) -> None:
        """Take it off the device, where it is not needed for now."""
        if self.here is not None and self._returning is None:
            self._check_unchanged(self.here)
            self._lane.wait(self._copied, self._lane.computing())
            self.here = None

    def _check_unchanged(self, x: Tensor) -> None:
        """As autograd itself does with what it keeps; the copy may have seen the change, or not."""
        if x._version != self._version:
            raise RuntimeError(
                "A layer changed its input in place, so it cannot be computed again in the backward pass."
            )

    def fetch(self) -> None:
        """Start to copy it back, unless it is on the device."""
        if self.here is None:
            shape, dtype, device = self._like
            self.here = torch.empty(shape, dtype=dtype, device=device)
            self._returning = self._lane.copy(self.here, self._host()), self._lane.computing()

    def take(self) -> Tensor:
        """It, on the device; it leaves with whoever asked."""
        self.fetch()
        x, self.here = self.here, None
        assert x is not None
        if self._returning is None:
            self._check_unchanged(x)
        self._arrive()
        return x

    def _arrive(self) -> None:
        if self._returning is not None:
            self._lane.wait(*self._returning)
            self._returning = None

    def __del__(self) -> None:
        if hasattr(self, "_returning"):
            self._arrive()  # of a step that was given up: nobody may get this memory while the copy writes to it
            self._free.append(self._buffer)


class OffloadedCheckpoint:
    """A function as torch's `checkpoint`, which keeps the tensors it is given in host memory.

    Args:
        own: the checkpoint function (not reentrant) that does all the rest.
        least_bytes: smaller tensors stay where they are.
        lane: device -> what copies from and to it; by default only tensors on CUDA devices are offloaded.
    """

    def __init__(
        self,
        own: Callable[..., Any],
        *,
        least_bytes: int = 1 << 20,
        lane: Callable[[torch.device], Any] | None = None,
    ) -> None:
        self.own, self.least_bytes, self.lane = own, least_bytes, lane
        self._lanes: dict[torch.device, Any] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._newest: dict[torch.device, weakref.ref[_Kept]] = {}

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As `own`."""
        if torch.compiler.is_compiling():
            return self.own(function, *args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, self._give):
            return self.own(function, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model begins with empty buffers."""
        return _again, (self.own, self.least_bytes, self.lane)

    def _keep(self, x: Tensor) -> Tensor | _Kept:
        if x.nbytes < self.least_bytes or not x.is_contiguous() or (self.lane is None and x.device.type != "cuda"):
            return x
        if x.device not in self._lanes:
            self._lanes[x.device] = (self.lane or StreamLane)(x.device)
        newest = self._newest[x.device]() if x.device in self._newest else None
        if newest is not None:
            newest.leave()
        kept = _Kept(x.detach(), self._lanes[x.device], self._free.setdefault(x.nbytes, []), newest)
        self._newest[x.device] = weakref.ref(kept)
        return kept

    @staticmethod
    def _give(kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = kept.take()
        before = None if kept.before is None else kept.before()
        if before is not None:
            before.fetch()
        return x


def _again(
    own: Callable[..., Any], least_bytes: int, lane: Callable[[torch.device], Any] | None
) -> OffloadedCheckpoint:
    return OffloadedCheckpoint(own, least_bytes=least_bytes, lane=lane)
