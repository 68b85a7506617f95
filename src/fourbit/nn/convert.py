"""Put the linear layers of any module into 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from fourbit.errors import InputError
from fourbit.nn.linear import QuantLinear, is_transposed_linear
from fourbit.quant import QuantConfig

__all__ = ["is_plain_linear", "is_skipped", "linear_layers", "quantize_module", "replace_module"]


def quantize_module(
    module: nn.Module, config: QuantConfig | None = None, *, skip: Sequence[str] | None = None
) -> nn.Module:
    """Replace every linear layer of a module by one in 4 bits, in place.

    Args:
        module: anything: vision, speech, robotics, language. `nn.Linear` and GPT-2's `Conv1D` are taken; subclasses of
            `nn.Linear` and layers whose weight is parametrized (weight norm, pruning) are not.
        config: NF4 with double quantization by default.
        skip: names to leave (see `QuantConfig.skip`, which it overrides); by default none.

    Returns:
        the module itself, or a `QuantLinear` where the module is itself a linear layer.

    Raises:
        NonFiniteWeight, UnsupportedDtype: names the layer.
        InputError: nothing to quantize, or a name in `skip` that matches nothing.
        The module is then unchanged up to the layer at fault.
    """
    config = config or QuantConfig()
    if skip is not None:
        config = replace(config, skip=skip)
    names = tuple(config.skip or ())
    if is_plain_linear(module):
        return QuantLinear.from_linear(module, config)
    found = list(linear_layers(module))
    unmatched = [name for name in names if not any(is_skipped(layer, (name,)) for layer, _ in module.named_modules())]
    if unmatched:
        raise InputError(f"No module is named {unmatched[0]!r}, which `skip` asks to leave as it is.")
    chosen = [(name, layer) for name, layer in found if not is_skipped(name, names)]
    if not chosen:
        raise InputError(f"There is no linear layer to quantize in this {type(module).__name__}.")
    shared: dict[int, QuantLinear] = {}
    for name, layer in chosen:
        if id(layer) not in shared:
            try:
                shared[id(layer)] = QuantLinear.from_linear(layer, config)
            except InputError as error:
                raise type(error)(f"{name}: {error}") from error
        replace_module(module, name, shared[id(layer)])
    _forbid_fast_encoders(module)
    return module


def _forbid_fast_encoders(module: nn.Module) -> None:
    """Keep torch's transformer encoder off its inference path, which reads the weights past their layers' `forward`."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and isinstance(layer.linear1, QuantLinear):
            layer.activation_relu_or_gelu = 0
        elif isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False


def linear_layers(
    module: nn.Module, *, is_linear: Callable[[nn.Module], bool] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """The layers that can be put into 4 bits, with their names; a shared layer comes under each of its names."""
    is_linear = is_linear or is_plain_linear
    for name, layer in module.named_modules(remove_duplicate=False):
        if is_linear(layer):
            yield name, layer


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that computes what `nn.Linear` or `Conv1D` does, and holds it in 16 or 32 bits."""
    if module._parameters.keys() != {"weight", "bias"}:  # weight norm and pruning keep other parameters
        return False
    return (type(module) is nn.Linear and module.weight.is_floating_point()) or is_transposed_linear(module)


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a dotted name is one of `skip`, lies below one, or ends in one (`head` matches `model.head.proj`)."""
    return any(f".{part}." in f".{name}." for part in skip)


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one with a dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)
