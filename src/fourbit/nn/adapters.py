"""Makes peft hand out the fused LoRA layer for 4-bit layers, whatever creates the adapter.

peft has no entry point for other people's layers: a class registered on a `LoraConfig` holds for that config only and
is not saved with it. So `install` wraps the last of peft's dispatchers, `dispatch_default`, for our layer alone. That
covers `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model`, transformers' `add_adapter` and
`load_adapter`, and `AutoPeftModel`, which all end there.

Every `QuantLinear` calls `install`. Importing peft takes seconds, so where peft is not imported yet the wrapper waits
for it: models without adapters never pay.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["hook_state", "install"]

_MODULE, _FUNCTION = "peft.tuners.lora.model", "dispatch_default"
_MARK = "__fourbit__"


def install() -> None:
    """Put the wrapper in place, now or when peft is imported. Cheap, and done once however often it is called."""
    module = sys.modules.get(_MODULE)
    if module is None:
        if _WATCHER not in sys.meta_path:
            sys.meta_path.insert(0, _WATCHER)
    elif not hasattr(module, _MARK) and not getattr(module.__spec__, "_initializing", False):
        _wrap(module)


def hook_state() -> str:
    """One sentence for `fourbit doctor`: whether adapters on 4-bit layers take the fused path."""
    install()
    module = sys.modules.get(_MODULE)
    if module is None:
        return "waiting: peft is not imported yet"
    if hasattr(getattr(module, _FUNCTION, None), _MARK):
        return "in place"
    return f"missing: {_complaint()}"


def _complaint() -> str:
    return (
        f"peft {importlib.metadata.version('peft')} has no {_MODULE}.{_FUNCTION}, so adapters on 4-bit layers run on"
        " peft's own layer: the results are right, but it is slower, takes more memory and cannot merge."
    )


def _wrap(module: ModuleType) -> None:
    setattr(module, _MARK, True)  # also where it fails, so that it complains once
    dispatch: Callable[..., nn.Module | None] | None = getattr(module, _FUNCTION, None)
    if dispatch is None:
        warnings.warn(_complaint(), RuntimeWarning, stacklevel=2)
        return

    @functools.wraps(dispatch)
    def dispatch_with_ours(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> nn.Module | None:
        from fourbit.nn import lora  # imports peft

        layer = lora.create(target, adapter_name, *args, **kwargs)
        return layer if layer is not None else dispatch(target, adapter_name, *args, **kwargs)

    setattr(dispatch_with_ours, _MARK, True)
    setattr(module, _FUNCTION, dispatch_with_ours)


class _Watcher(MetaPathFinder):
    """Finds nothing itself: it has `_wrap` run right after the module it waits for has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in finders if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrappingLoader(spec.loader)
        return spec


class _WrappingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _wrap(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source, get_data, ... for tracebacks and inspection


_WATCHER = _Watcher()
