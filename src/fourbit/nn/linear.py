"""A linear layer whose frozen weight is held in 4 bits.

It is an `nn.Linear` whose `weight` is the packed codes, so that code which looks for linear layers finds it and code
which counts, moves or freezes parameters does the right thing. The scales are plain attributes, not buffers: they move
with the layer but are never cast with it, and loaders that fill every buffer they see leave them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import BrokenCheckpoint
from fourbit.formats import packed_size
from fourbit.kernels import dispatch, ops
from fourbit.nn import adapters
from fourbit.quant import QuantConfig, QuantizedTensor, quantize
from fourbit.quant.layout import STATISTICS
from fourbit.quant.tensor import levels_on

__all__ = ["QuantLinear", "is_transposed_linear", "linear_weight"]

_SCALES = ("absmax", "nested_absmax", "nested_offset")


class QuantLinear(nn.Linear):
    """y = x W^T + bias with W [N, K] frozen in 4 bits.

    Attributes:
        weight: [ceil(NK/2), 1] uint8, the packed codes; never requires a gradient.
        bias: [N] or None, in its own dtype; trainable if the caller makes it so.
        config: how the weight is quantized, and the compute dtype.

    An empty layer (`QuantLinear(K, N)`) has no scales; `load_state_dict` or `set_quantized` fills it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight in 16 or 32 bits
        self.in_features, self.out_features = in_features, out_features
        self.config = config or QuantConfig()
        packed = torch.empty((packed_size(in_features * out_features), 1), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.absmax: Tensor | None = None
        self.nested_absmax: Tensor | None = None
        self.nested_offset: Tensor | None = None
        self.levels = levels_on(self.config.format, self.weight.device)
        self.weight_dtype = dtype or torch.get_default_dtype()
        adapters.install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        adapters.install()  # what pickle makes never sees __init__

    @classmethod
    def from_linear(cls, linear: nn.Module, config: QuantConfig | None = None) -> QuantLinear:
        """Quantize a linear layer.

        Args:
            linear: an `nn.Linear`, or a GPT-2 `Conv1D`, whose weight is stored transposed. Left as it is.
            config: NF4 with double quantization by default.

        Raises:
            UnsupportedDtype, NonFiniteWeight; TypeError for any other module.
        """
        weight = linear_weight(linear)
        layer = cls(weight.shape[1], weight.shape[0], bias=False, config=config, device="meta", dtype=weight.dtype)
        layer.set_quantized(quantize(weight, layer.config))
        if isinstance(bias := linear.bias, Tensor):
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor` that shares this layer's memory."""
        return QuantizedTensor(
            self.weight.data.view(-1),
            self._loaded_absmax(),
            self.nested_absmax,
            self.nested_offset,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.config.format,
            self.config.block_size,
        )

    def _loaded_absmax(self) -> Tensor:
        if self.absmax is None:
            raise BrokenCheckpoint("This QuantLinear has no scales: nothing was loaded into it.")
        return self.absmax

    def set_quantized(self, weight: QuantizedTensor) -> None:
        """Take over a quantized weight, sharing its memory.

        Raises:
            BrokenCheckpoint: its shape is not [N, K].
        """
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise BrokenCheckpoint(
                f"A quantized weight of shape {list(weight.shape)} was given; {list(expected)} fits."
            )
        packed = weight.packed.view(-1, 1)
        if packed.device == self.weight.device:
            self.weight.data = packed  # the parameter itself stays, as others may hold it
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax, self.weight_dtype = weight.absmax, weight.dtype
        self.nested_absmax, self.nested_offset = weight.nested_absmax, weight.nested_offset
        self.levels = weight.levels
        self.config = replace(
            self.config, format=weight.format, block_size=weight.block_size, double_quant=weight.double_quant
        )

    def dequantize(self) -> Tensor:
        """[N, K], the weight in the dtype it was quantized from."""
        return self.quantized.dequantize()

    @property
    def W_q(self) -> nn.Parameter:
        """The packed codes under the name by which peft knows a weight that `dequantize()` decodes."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in the dtype of `x` (under autocast, in autocast's)."""
        product, result = self.dtypes(x)
        y = ops.linear(
            x.to(product), self.weight, bias=self.bias, out_features=self.out_features, **self.weight_arguments
        )
        return y.to(result)

    def bind(self, like: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The product as one call without gradients, for a loop in which the layer and the kind of input stay.

        Args:
            like: [..., K], an input as they will come.

        Returns:
            the function; None where the product runs in another dtype than `like` has.
        """
        found = self.operation(like)
        if found is None:
            return None
        name, arguments = found
        run = dispatch.OPERATIONS[name].choose(like, *arguments)
        return lambda x: run(x, *arguments)

    def operation(self, like: Tensor) -> tuple[str, tuple[Any, ...]] | None:
        """Which operation that call runs, and its arguments after x; None as with `bind`."""
        if self.dtypes(like) != (like.dtype, like.dtype):
            return None
        return "linear", (self.weight, *self.weight_arguments.values(), self.out_features, self.bias)

    @property
    def weight_arguments(self) -> dict[str, Any]:
        """What every operation on this weight needs besides the packed codes, in the order of their schemas."""
        return {
            "absmax": self._loaded_absmax(),
            "nested_absmax": self.nested_absmax,
            "nested_offset": self.nested_offset,
            "levels": self.levels,
            "block_size": self.config.block_size,
        }

    def dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """What the product with `x` runs in, and what it is returned in.

        It is returned in autocast's dtype where autocast is on, else in that of `x`, and runs in the configured compute
        dtype, else in the one it is returned in. Integers stay as they are, to be refused.
        """
        device, result = x.device.type, x.dtype
        if not x.is_floating_point():
            return result, result
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            result = torch.get_autocast_dtype(device)
        return self.config.torch_compute_dtype or result, result

    def extra_repr(self) -> str:
        config = self.config
        scales = "double-quantized" if config.double_quant else "fp32"
        return f"{super().extra_repr()}, {config.format}, block_size={config.block_size}, {scales} scales"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.weight.device
        self.levels = levels_on(self.config.format, device)
        for name in _SCALES:
            scale = getattr(self, name)
            if scale is not None and scale.device != device:
                without_values = "meta" in (scale.device.type, device.type)
                setattr(self, name, torch.empty_like(scale, device=device) if without_values else scale.to(device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.absmax is not None and self.weight.device.type != "meta":
            tensors = self.quantized.state_dict(f"{prefix}weight")
            del tensors[f"{prefix}weight"]
            destination.update(tensors)

    def _take_over(self, weight: QuantizedTensor, *, assign: bool) -> None:
        """Take a weight out of a state dict: itself, or, as torch has it without `assign`, a copy on this device."""
        if not assign and self.weight.device.type != "meta":
            weight = weight.to(self.weight.device, copy=True)
        self.set_quantized(weight)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        known = {f"{name}.{suffix}" for suffix in STATISTICS}
        present = known & state_dict.keys()
        if present and name in state_dict:
            try:
                weight = QuantizedTensor.from_state_dict({k: state_dict[k] for k in (name, *present)}, name)
                self._take_over(weight, assign=local_metadata.get("assign_to_params_buffers", False))
            except BrokenCheckpoint as error:
                error_msgs.append(str(error))
                return
            state_dict = {k: v for k, v in state_dict.items() if k not in known} | {name: self.weight.data}
        elif name in state_dict and state_dict[name].is_floating_point():
            error_msgs.append(f"{name} is in {state_dict[name].dtype}; load it before the layer is quantized.")
            return
        elif name in state_dict:
            missing_keys.append(f"{name}.absmax")
            state_dict = state_dict | {name: self.weight.data}  # codes without their scales are not taken
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def linear_weight(module: nn.Module) -> Tensor:
    """[N, K], the weight of an `nn.Linear` or of a GPT-2 `Conv1D` (which holds [K, N]).

    Raises:
        TypeError: the module is neither.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if is_transposed_linear(module):
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        return weight.t().contiguous()
    raise TypeError(f"A {type(module).__name__} is not a linear layer.")


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, recognised by its shape so that transformers need not be imported."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2
    )
