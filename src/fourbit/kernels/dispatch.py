"""Which backend runs an operation, and why.

An operation is one `torch.library` contract (`kernels/ops`) with a plain-torch reference (`kernels/reference`), the
truth on every device, and at most one faster backend per device type: `native` (C++) on a CPU, `triton` on a GPU. A
backend module holds, for each operation it implements, a function of the operation's name and an `accepts_<operation>`
predicate with the same arguments. A backend package holds `devices()`, the device types it takes; `unavailable()`, the
reason it cannot run here at all; and `describe(stem)`, what it runs on and how it chooses.

`FOURBIT_BACKEND=reference` (or `use("reference")`) turns the fast backends off; `native` and `triton` demand that one,
and raise with the reason where it cannot take a call. The default, `auto`, falls back to the reference. With Triton's
interpreter (TRITON_INTERPRET=1) `triton` takes tensors on the CPU when asked for by name; see `kernels.triton.launch`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fourbit.errors import InputError

__all__ = [
    "OPERATIONS",
    "Operation",
    "define",
    "explain",
    "kept_for_all",
    "no_second_derivative",
    "refuse_second_derivative",
    "use",
]

LIBRARY = torch.library.Library("fourbit", "DEF")
FAST_BACKENDS = {"cpu": "native", "cuda": "triton"}
"""The fast backend of each device type. A device without one runs the reference."""

_CHOICES = ("auto", "reference", *FAST_BACKENDS.values())
_forced: str | None = None


Fast = tuple[Callable[..., Any], Callable[..., str | None]]
"""A backend's function, and its predicate."""


@dataclass(slots=True)
class Operation:
    """One registered operation and the functions that can run it.

    Attributes:
        name: the name under `torch.ops.fourbit`.
        stem: the module name shared by its contract, its backends, its test and its benchmark.
        reference: the plain-torch truth.
    """

    name: str
    stem: str
    reference: Callable[..., Any]
    _fast: dict[tuple[str, str], Fast | str] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Run on the best backend that takes these arguments; the first is a tensor on the device that counts.

        Autocast is off inside: it has had its say in the arguments, and a cast that one backend's torch calls would
        make and another's would not is a different result.
        """
        _check_devices(self.name, args)
        device = args[0].device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._run(*args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        return self.choose(*args)(*args)

    def choose(self, *args: Any) -> Callable[..., Any]:
        """What these arguments run on: for a loop that calls it with others of the same shapes, dtypes and devices.

        Called so, an operation has no gradient, is not traced, and pays neither for torch's dispatch nor for ours.
        """
        choice = _choice()
        if choice == "reference":
            return self.reference
        fast = self._resolve(choice, args[0].device.type)
        reason = fast if isinstance(fast, str) else fast[1](*args)
        if reason is None:
            return fast[0]  # type: ignore[return-value]
        if choice != "auto":
            raise RuntimeError(f"FOURBIT_BACKEND={choice}, but it cannot run {self.name}: {reason}")
        return self.reference

    def _resolve(self, choice: str, device: str) -> Fast | str:
        """The function and predicate of the chosen backend, `auto` or its name, or the reason there are none."""
        key = choice, device
        if key not in self._fast:
            self._fast[key] = self._load(choice, device)
        return self._fast[key]

    def _load(self, choice: str, device: str) -> Fast | str:
        backend = FAST_BACKENDS.get(device) if choice == "auto" else choice
        if backend is None:
            return f"there are no kernels of ours for {device} devices"
        package = importlib.import_module(f"fourbit.kernels.{backend}")
        if device not in package.devices():
            return f"{backend} has no kernels for {device} devices"
        if (reason := package.unavailable()) is not None:
            return str(reason)
        try:
            module = importlib.import_module(f"fourbit.kernels.{backend}.{self.stem}")
        except ModuleNotFoundError:
            return f"{backend} has no kernel for it"
        if not hasattr(module, self.name):
            return f"{backend} has no kernel for it"
        return getattr(module, self.name), getattr(module, f"accepts_{self.name}")

    def explain(self, device: str) -> dict[str, str]:
        """What this operation runs on for a device type: `backend` and `why`."""
        choice = _choice()
        if choice == "reference":
            return {"backend": "reference", "why": "asked for"}
        fast = self._resolve(choice, device)
        if isinstance(fast, str):
            return {"backend": "reference", "why": fast}
        backend = FAST_BACKENDS[device] if choice == "auto" else choice
        return {"backend": backend, "why": importlib.import_module(f"fourbit.kernels.{backend}").describe(self.stem)}


OPERATIONS: dict[str, Operation] = {}
"""Every operation by name, in the order of definition."""


def define(
    schema: str,
    *,
    stem: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
) -> Operation:
    """Register an operation with torch.

    Args:
        schema: as torch.library takes it, without the namespace: `name(Tensor x, ...) -> Tensor`.
        stem: see `Operation`.
        reference: takes the schema's arguments in order.
        fake: gives outputs of the right shape and dtype, and raises on arguments that no backend takes.
    """
    name = schema.partition("(")[0]
    operation = Operation(name, stem, reference)
    LIBRARY.define(schema)

    def checked_fake(*args: Any) -> Any:
        _check_devices(name, args)  # torch comes here, too, when only one of the tensors is on the meta device
        return fake(*args)

    LIBRARY.impl(name, operation.__call__, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fourbit::{name}", checked_fake, lib=LIBRARY)
    OPERATIONS[name] = operation
    return operation


def refuse_second_derivative(name: str) -> None:
    """Make it an error to differentiate `name`, a backward pass; torch would leave its part out without a word.

    Args:
        name: of an operation that ends in `_backward`.
    """

    def refuse(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(no_second_derivative(name.removesuffix("_backward")))

    torch.library.register_autograd(f"fourbit::{name}", refuse, lib=LIBRARY)


def no_second_derivative(name: str) -> str:
    """What to say of an operation that can be differentiated once."""
    return f"fourbit::{name} has no second derivative; take it without fourbit.prepare, and without an active adapter."


def _check_devices(name: str, args: Sequence[Any]) -> None:
    device = args[0].device
    for other in args:
        if not isinstance(other, Tensor) or (other.dim() == 0 and other.device.type == "cpu"):
            continue  # one number on the CPU goes with any device, as in torch itself
        if other.device != device:
            raise RuntimeError(f"fourbit::{name} needs its tensors on one device; found {device} and {other.device}.")


def explain(device: str = "cpu") -> dict[str, dict[str, str]]:
    """What every operation runs on for a device type, and why."""
    importlib.import_module("fourbit.kernels.ops")
    return {name: operation.explain(device) for name, operation in OPERATIONS.items()}


@contextmanager
def kept_for_all() -> Iterator[None]:
    """Make plain tensors in a `with` block: what is cached must outlive the mode that its first user happens to be in.

    A tensor of inference mode cannot be saved for a backward pass, and one of `FakeTensorMode` holds nothing.
    """
    with torch.inference_mode(False), unset_fake_temporarily():
        yield


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend within a `with` block, as FOURBIT_BACKEND does for a process."""
    global _forced
    before, _forced = _forced, _checked(backend)
    try:
        yield
    finally:
        _forced = before


def _choice() -> str:
    return _checked(_forced or os.environ.get("FOURBIT_BACKEND", "auto"))


def _checked(choice: str) -> str:
    if choice not in _CHOICES:
        raise InputError(f"There is no backend named {choice!r}; the choices are {', '.join(_CHOICES)}.")
    return choice
