"""peft's LoRA layer for a linear layer in 4 bits: the same adapter, one fused operation.

peft creates it, names its parameters, saves, loads, activates and deletes its adapters. Two things are ours: the
forward pass, which runs as one operation where exactly one plain adapter is active (`kernels.ops.lora`), and merging,
which has to go through the 4-bit codes. Everything else - several active adapters, mixed batches, DoRA, a bias on the
adapter - runs on peft's own path over `QuantLinear`, which is differentiable by itself.

Importing this imports peft; only the wrapper in `nn.adapters` does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from fourbit.errors import InputError, NonFiniteWeight
from fourbit.kernels import dispatch, ops
from fourbit.kernels.dropout import draw_seed
from fourbit.nn.linear import QuantLinear
from fourbit.quant import QuantizedTensor, quantize

__all__ = ["LoraQuantLinear", "create"]

_VARIANTS = ((), ("use_dora",), ("arrow_config",), ("alora_invocation_tokens",), ("mica",))
"""The variants that do not need the base weight in 16 bits beyond `dequantize()`, by the name of their config field."""


def create(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> LoraQuantLinear | None:
    """What peft's dispatchers do: a layer for a target that is, or wraps, a `QuantLinear`; None for any other.

    Raises:
        InputError: `target_parameters` names a weight in 4 bits.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, QuantLinear):
        return None
    if parameter_name is not None:
        raise InputError(
            f"`target_parameters` names {kwargs.get('target_name', parameter_name)}, which is in 4 bits; name the layer"
            " in `target_modules` instead."
        )
    return LoraQuantLinear(target, adapter_name, config, **kwargs)


class LoraQuantLinear(Linear):
    """y = x W^T + bias + s (d(x) A^T) B^T with W in 4 bits; see `kernels.ops.lora`.

    The products run in the dtype that those of the base layer run in, which is what peft does under autocast. (Without
    autocast peft multiplies in the adapter's own dtype, which its default makes fp32.)
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.fan_in_fan_out:
            # Right for the Conv1D that the layer was, and for loading the adapter there; W is [N, K] here.
            config = copy.copy(config)
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._before_merge: tuple[QuantizedTensor, Tensor | None] | None = None

    @property
    def _quant_linear(self) -> QuantLinear:
        """The base layer, also from below another tuner's layer."""
        return cast(QuantLinear, self.get_base_layer())

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """peft's own, without those that rewrite the base weight or take its dtype for the adapter's."""
        return {fields: variant for fields, variant in super().lora_variants.items() if fields in _VARIANTS}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., K] to [..., N], in the dtype that the base layer returns."""
        name = None if args or kwargs else self._fused_adapter()
        if name is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        base = self._quant_linear
        product, result = base.dtypes(x)
        x = x.to(product)
        dropout = _dropout_rate(self.lora_dropout[name])
        y = ops.lora_linear(
            x,
            base.weight,
            lora_a=cast(Tensor, self.lora_A[name].weight),
            lora_b=cast(Tensor, self.lora_B[name].weight),
            scaling=self.scaling[name],
            bias=base.bias,
            seed=draw_seed() if dropout else None,
            dropout=dropout,
            **base.weight_arguments,
        )
        return y.to(result)

    def bind(self, like: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The forward pass as one call without gradients and dropout; see `QuantLinear.bind`.

        Returns:
            the function; None also where the layer takes peft's own path.
        """
        found = self.operation(like)
        if found is None:
            return None
        name, arguments = found
        run = dispatch.OPERATIONS[name].choose(like, *arguments)
        return lambda x: cast(Tensor, run(x, *arguments)[0])

    def operation(self, like: Tensor) -> tuple[str, tuple[Any, ...]] | None:
        """Which operation that call runs, and its arguments after x; None as with `bind`."""
        name, base = self._fused_adapter(), self._quant_linear
        if name is None or self.training or base.dtypes(like) != (like.dtype, like.dtype):
            return None
        adapter = cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)
        weight = base.weight, *base.weight_arguments.values()
        return "lora_linear", (*weight, base.bias, *adapter, self.scaling[name], None, 0.0)

    def _fused_adapter(self) -> str | None:
        """The one active adapter, if it is one that the fused operation computes."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return None
        name = active[0]
        lora_a, lora_b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        plain = (
            isinstance(self.base_layer, QuantLinear)
            and type(lora_a) is type(lora_b) is nn.Linear
            and type(dropout) in (nn.Dropout, nn.Identity)
        )
        # The operation calls none of these modules, so whoever hooked into one would miss the call.
        watched = any(map(_is_hooked, (self.base_layer, lora_a, lora_b, dropout)))
        return name if plain and not watched else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the 4-bit weight: decode, add the deltas in fp32, quantize again.

        That rounds, so outputs change by about a quantization error; the codes as they were are kept, and `unmerge`
        puts them back to the bit.

        Args:
            safe_merge: nothing more than without it: a merged weight is always checked before it replaces the other.
            adapter_names: all active ones by default.

        Raises:
            NonFiniteWeight: an adapter holds NaN or infinity; nothing of it was merged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        warnings.warn(
            "Merging an adapter into 4-bit weights rounds them again, which changes the outputs a little;"
            " merge into the 16-bit model where that matters.",
            stacklevel=2,
        )
        base = self._quant_linear
        for name in names:
            before = base.quantized, None if base.bias is None else base.bias.data
            try:
                merged = quantize(self._merged_weight(name), base.config)
            except NonFiniteWeight as error:
                raise NonFiniteWeight(f"Adapter {name!r} holds NaN or infinity and was not merged.") from error
            if self.lora_bias[name]:
                base.bias.data = self._merged_bias(name)  # type: ignore[union-attr]
            base.set_quantized(replace(merged, dtype=base.weight_dtype))
            self._before_merge = self._before_merge or before
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the codes, scales and bias that the layer had before the first merge, to the bit."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self._quant_linear
        quantized, bias = self._before_merge
        base.set_quantized(quantized.to(base.weight.device))
        if base.bias is not None and bias is not None:
            base.bias.data = bias.to(base.weight.device)
        self.merged_adapters.clear()
        self._before_merge = None

    def _merged_weight(self, name: str) -> Tensor:
        """[N, K] fp32: the base weight with one more adapter in it."""
        current = self._quant_linear.quantized
        if name in self.lora_variant:
            weight: Tensor = self.lora_variant[name].merge_safe(self, name, current.dequantize(torch.float32))
            return weight.float()
        added = [name]
        if self._before_merge and not self.lora_variant.keys() & set(self.merged_adapters):
            # Plain deltas commute: start from the first weight, so that only one rounding is between it and the result.
            current, added = self._before_merge[0].to(current.device), [*self.merged_adapters, name]
        weight = current.dequantize(torch.float32)
        for adapter in added:
            weight += self.get_delta_weight(adapter)
        return weight

    def _merged_bias(self, name: str) -> Tensor:
        bias: Tensor | None = self._quant_linear.bias
        if bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        merged: Tensor = bias.data + self.lora_B[name].bias.data * self.scaling[name]
        if not bool(torch.isfinite(merged).all()):
            raise NonFiniteWeight(f"The bias of adapter {name!r} holds NaN or infinity and was not merged.")
        return merged.to(bias.dtype)

    # Initialisations that read the base weight see it decoded. Those that leave a residual in it have the residual
    # quantized, as peft itself does for OLoRA on bitsandbytes.

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        with self._decoded_weight(changes=True):
            super().pissa_init(adapter_name, init_lora_weights)  # type: ignore[no-untyped-call]

    def olora_init(self, adapter_name: str) -> None:
        with self._decoded_weight(changes=True):
            super().olora_init(adapter_name)  # type: ignore[no-untyped-call]

    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        with self._decoded_weight(changes=True):
            super().corda_init(adapter_name, init_lora_weights)  # type: ignore[no-untyped-call]

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        with self._decoded_weight(changes=True):
            super().lora_ga_init(adapter_name, lora_ga_config)  # type: ignore[no-untyped-call]

    def mica_init(self, adapter_name: str) -> None:
        with self._decoded_weight(changes=False):
            super().mica_init(adapter_name)  # type: ignore[no-untyped-call]

    def orthogonal_init(self, adapter_name: str) -> None:
        with self._decoded_weight(changes=False):
            super().orthogonal_init(adapter_name)  # type: ignore[no-untyped-call]

    def loftq_init(self, adapter_name: str, config: LoraConfig) -> None:
        raise InputError(
            "LoftQ makes up for the error of quantization and so needs the 16-bit weight, which a 4-bit layer no longer"
            " has; use init_lora_weights=True, 'pissa' or 'olora'."
        )

    @contextmanager
    def _decoded_weight(self, *, changes: bool) -> Iterator[None]:
        """Hold the base weight as [N, K] fp32 within the block; with `changes`, quantize what the block makes of it."""
        base = self._quant_linear
        before = after = base.quantized
        base.weight.data = before.dequantize(torch.float32)
        try:
            yield
            if changes:
                after = replace(quantize(base.weight.data, base.config), dtype=before.dtype)
        finally:
            base.set_quantized(after)


def _dropout_rate(dropout: nn.Module) -> float:
    """The share of elements that a module drops now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _is_hooked(module: nn.Module) -> bool:
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(hooks) or "forward" in module.__dict__
