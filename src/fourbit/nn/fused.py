"""Give a module of another library a faster forward pass, and leave everything else about it as it was.

`fuse(module, FusedNorm, settings)` makes the module an instance of a class derived from its own, with the forward pass
of `FusedNorm`. Its parameters, names, hooks and state dict stay; it is still an instance of its first class, which
`isinstance`, adapters and checkpoint code rely on; and the derived class carries the first one's name, which
`save_pretrained` writes into config.json. Copies and pickles hold the two importable classes and derive anew.

Nothing outside of the module changes: another model of the same architecture runs as it did.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, cast

from torch import nn

__all__ = ["DEVICES", "Fused", "fuse", "is_fused", "rebound"]

DEVICES = ("cpu", "cuda")
"""The types of device that our kernels for whole modules are written for; on another a module runs as it always did."""


class Fused:
    """What the faster forward passes have in common; mixed in before the module's own class."""

    fourbit_settings: Any
    """What the forward pass has to know; found when the module was fused, and copied and pickled with it."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """What the derived class defines beyond its name: here this class's forward pass under the base's signature,
        which the Trainer reads to decide which columns of a dataset a model takes."""
        run = cls.forward  # type: ignore[attr-defined]

        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run(self, *args, **kwargs)

        return {"forward": forward}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return (_rebuild, _ORIGINS[type(self)], *state)


def fuse(module: nn.Module, kind: type[Fused], settings: Any) -> None:
    """Give a module the forward pass of `kind`, in place."""
    module.__class__ = _derive(kind, type(module))
    module.fourbit_settings = settings


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` was applied to this module."""
    return isinstance(module, Fused)


def rebound(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """The function made again with some names of its module bound to something else, for this copy alone."""
    # Without its module's name, torch.compile looks the function's globals up here and not in that module.
    scope = {name: value for name, value in function.__globals__.items() if name != "__name__"} | names
    again = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    again.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(again, function)


_DERIVED: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}
_ORIGINS: dict[type, tuple[type[Fused], type[nn.Module]]] = {}
"""What each derived class was derived from."""


def _derive(kind: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """The one class that has the forward pass of `kind` and everything else from `base`."""
    if (kind, base) not in _DERIVED:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        derived = type(base.__name__, (kind, base), {**names, **kind.members(base)})
        _DERIVED[kind, base] = derived
        _ORIGINS[derived] = kind, base
    return _DERIVED[kind, base]


def _rebuild(kind: type[Fused], base: type[nn.Module]) -> nn.Module:
    derived = _derive(kind, base)
    module: nn.Module = derived.__new__(derived)
    return module
