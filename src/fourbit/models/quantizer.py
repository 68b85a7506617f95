"""The transformers plug-in: any architecture of transformers, with its linear layers in 4 bits.

transformers builds the model without memory, asks us to replace its linear layers, reads the tensors one at a time
under its own renaming and conversion rules, and hands us those that are to be quantized (or, where the folder is in
4 bits already, the parts of each weight). Saving needs no code here: a `QuantLinear` writes bitsandbytes' keys, and
`QuantConfig.to_dict` its settings.

The interface moved between transformers 5.17 and 5.23; what is overridden here is what both have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from fourbit.errors import BrokenCheckpoint, InputError, NonFiniteWeight
from fourbit.models import targets
from fourbit.models.values import is_finite
from fourbit.nn import QuantLinear
from fourbit.nn.convert import replace_module
from fourbit.nn.linear import is_transposed_linear
from fourbit.quant import QuantConfig, QuantizedTensor, quantize
from fourbit.quant.config import COMPUTE_DTYPES
from fourbit.quant.layout import STATISTICS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FourBitQuantizer"]

logger = logging.getLogger(__name__)


class FourBitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes while transformers loads; one instance per model, kept as `model.hf_quantizer`.

    Attributes:
        quantization_config: the `QuantConfig` asked for, and after loading the one that the saved folder will name.
        sources: the checkpoint key of each weight that was quantized from just one tensor, by its name in the model.
        transposed: names of the layers that were GPT-2's `Conv1D`, whose weights are stored transposed.
    """

    requires_calibration = False
    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.sources: dict[str, str] = {}
        self.transposed: set[str] = set()
        self._targets = targets.Targets(frozenset(), None)
        self._shapes: dict[str, torch.Size] = {}
        self._error: InputError | None = None

    @property
    def target_names(self) -> frozenset[str]:
        """The layers that are in 4 bits."""
        return self._targets.names

    def is_serializable(self) -> bool:
        """A 4-bit model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True

    def get_quantize_ops(self) -> ConversionOps:
        """What each weight that `param_needs_quantization` goes through."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What gathers the parts of a weight from a folder that is in 4 bits already."""
        if not self.pre_quantized:
            return []
        parts = sorted((f"weight.{suffix}" for suffix in STATISTICS), key=len, reverse=True)
        return [WeightConverter([*parts, "weight"], "weight", [_Assemble(self)])]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is one that we hold in 4 bits; it is then exempt from transformers' check of shapes."""
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, QuantLinear) and leaf == "weight"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        self._targets = (targets.read if self.pre_quantized else targets.choose)(model, config.skip)
        layers: dict[int, QuantLinear] = {}
        for name in sorted(self._targets.names):
            linear = model.get_submodule(name)
            if is_transposed_linear(linear):
                self.transposed.add(name)
            if id(linear) not in layers:
                layers[id(linear)] = _empty_layer(linear, config, filled=self.pre_quantized)
            replace_module(model, name, layers[id(linear)])
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._error is None:
            body = f"{model.base_model_prefix}."
            for name in sorted(self._targets.names):
                self._finish_layer(f"{name}.weight", model.get_submodule(name), is_new=not name.startswith(body))
        if self._error is not None:
            raise self._error
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.shape != (expected := self._shapes.get(name, parameter.shape)):
                raise _wrong_shape(name, parameter, list(expected))
            if not is_finite(parameter.detach()):
                raise NonFiniteWeight(f"The tensor {name} holds NaN or infinity.")
        _report_rest(model)
        self.quantization_config = self._as_loaded(model)
        model.config.quantization_config = self.quantization_config
        # What assembled or split our weights must not be undone when the model is saved: they no longer have that form.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not self._touches_targets(c)]
        return model

    def _as_loaded(self, model: PreTrainedModel) -> QuantConfig:
        """The config to save: with the layers that were left, and computing as this model does."""
        config = replace(self.quantization_config, skip=self._targets.skip)
        if self._targets.names:  # what the tensors say counts
            held = model.get_submodule(min(self._targets.names)).config
            config = replace(held, skip=config.skip, compute_dtype=config.compute_dtype)
        dtype = str(model.dtype).removeprefix("torch.")
        if config.compute_dtype is None and dtype in COMPUTE_DTYPES:
            config = replace(config, compute_dtype=dtype)
        return config

    def _finish_layer(self, name: str, layer: nn.Module, *, is_new: bool) -> None:
        """Check the scales of a weight that was read, or quantize one that transformers made up.

        `is_new`: it belongs to a head that the model's class puts on top, which a checkpoint need not hold.
        """
        if not isinstance(layer, QuantLinear) or layer.weight.device.type == "meta":
            return
        if layer.absmax is None and (self.pre_quantized or not is_new):
            raise BrokenCheckpoint(f"The tensor {name} is missing.")
        if layer.absmax is None:
            self._fill(layer, name, layer.weight.detach())
        scales = layer.absmax if layer.nested_absmax is None else layer.nested_absmax
        if self.pre_quantized and scales is not None and not is_finite(scales):
            raise NonFiniteWeight(f"The scales of the tensor {name} hold NaN or infinity.")

    def _touches_targets(self, conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        if any(isinstance(operation, _Assemble) for operation in conversion.operations):
            return True
        return any(pattern.strip("\\.^$") in name for pattern in conversion.target_patterns for name in self._converted)

    @property
    def _converted(self) -> list[str]:
        """Quantized weights that were not one tensor of the checkpoint, but made from several or a part of one."""
        return (
            [] if self.pre_quantized else [n for t in self._targets.names if (n := f"{t}.weight") not in self.sources]
        )

    def _fill(self, layer: QuantLinear, name: str, weight: Tensor) -> None:
        """Quantize a weight into its layer; an error is kept, as transformers would turn it into a line of a table."""
        try:
            expected = [layer.out_features, layer.in_features]
            if name.rpartition(".")[0] in self.transposed:
                weight = weight.t()
            if list(weight.shape) != expected:
                raise _wrong_shape(name, weight, expected)
            if weight.device.type != "meta":
                layer.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
                layer.set_quantized(quantize(weight.contiguous(), layer.config))
        except NonFiniteWeight:
            self._fail(NonFiniteWeight(f"The tensor {name} holds NaN or infinity and cannot be quantized."))
        except InputError as error:
            self._fail(error)

    def _fail(self, error: InputError) -> None:
        self._error = self._error or error

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # saving a model makes its config's dtype a string
        decoded_dtype: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                replace_module(model, name, _decoded(layer, decoded_dtype, transposed=name in self.transposed))
        return model


class _Quantize(ConversionOps):  # type: ignore[misc]
    """16-bit weights of one conversion to 4 bits; other tensors that come out of it pass."""

    def __init__(self, quantizer: FourBitQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        results = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            module, leaf = get_module_from_name(model, name)
            if isinstance(module, QuantLinear) and leaf == "weight":
                if list(target_patterns) == [name]:  # a plain renaming: the pattern is the key itself
                    self._quantizer.sources[name] = source_patterns[0]
                self._quantizer._fill(module, name, tensor)
                tensor = module.weight
            results[name] = tensor
        return results


class _Assemble(ConversionOps):  # type: ignore[misc]
    """The parts of one weight in bitsandbytes' layout to a layer's weight; a weight that is not in 4 bits passes."""

    def __init__(self, quantizer: FourBitQuantizer) -> None:
        # by this name transformers knows that it must not cast what we are given
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: Mapping[int, Any]) -> _Assemble:
        return self  # transformers copies it for every weight

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        name, quantizer = full_layer_name, self.hf_quantizer
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        layer, _ = get_module_from_name(model, name)
        weight = parts["weight"] if "weight" in parts else torch.empty(0)
        if not isinstance(layer, QuantLinear):
            if len(parts) > 1:
                quantizer._fail(
                    BrokenCheckpoint(f"The tensor {name} is in 4 bits, but config.json lists it as left out.")
                )
            return {"weight": _cast(weight, name, model)}
        if weight.device.type == "meta":
            return {"weight": layer.weight}
        try:
            tensors = {f"{name.removesuffix('weight')}{key}": value for key, value in parts.items()}
            read = QuantizedTensor.from_state_dict(tensors, name)
            expected = [layer.out_features, layer.in_features]
            if list(read.shape) != expected:
                raise _wrong_shape(name, read, expected)
            layer.set_quantized(read)
        except InputError as error:
            quantizer._fail(error)
        return {"weight": layer.weight}


def _empty_layer(linear: nn.Module, config: QuantConfig, *, filled: bool) -> QuantLinear:
    """A layer on the meta device in place of `linear`.

    `filled`: its weight will come in 4 bits. Else it stands in as the 16-bit weight that will be read, because
    transformers casts what it reads to the dtype that it finds there.
    """
    weight: Tensor = linear.weight  # type: ignore[assignment]
    rows, columns = weight.t().shape if is_transposed_linear(linear) else weight.shape
    bias = getattr(linear, "bias", None) is not None
    layer = QuantLinear(columns, rows, bias=bias, config=config, device="meta", dtype=weight.dtype)
    if not filled:
        placeholder = torch.empty(rows, columns, dtype=weight.dtype, device="meta")
        layer.weight = nn.Parameter(placeholder, requires_grad=False)
    return layer.train(linear.training)


def _wrong_shape(name: str, tensor: Tensor | QuantizedTensor, expected: list[int]) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"The tensor {name} has the shape {list(tensor.shape)}; the model that config.json describes needs {expected}."
    )


def _cast(tensor: Tensor, name: str, model: PreTrainedModel) -> Tensor:
    """Give a tensor that stays in 16 bits the dtype of its parameter, or fp32 where its class asks for that."""
    if not tensor.is_floating_point():
        return tensor
    dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return tensor.to(next((kept for part, kept in plan.items() if part in name), dtype))


def _report_rest(model: PreTrainedModel) -> None:
    """Say so where much of a model is not in linear layers: experts that are fused into one tensor stay in 16 bits."""
    fused = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 2 and "expert" in name}
    if fused and model.device.type != "meta":
        share = sum(fused.values()) / sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
        logger.warning(
            "The experts (%s and %d more, %.0f%% of all parameters) stay in 16 bits: they are no linear layers.",
            next(iter(fused)),
            len(fused) - 1,
            100 * share,
        )


def _decoded(layer: QuantLinear, dtype: torch.dtype | None, *, transposed: bool) -> nn.Module:
    """The 16-bit layer that a `QuantLinear` was made from, with the values it has now."""
    weight = layer.quantized.dequantize(dtype or layer.weight_dtype)
    linear: nn.Module
    with torch.device("meta"):
        if transposed:
            linear, weight = Conv1D(layer.out_features, layer.in_features), weight.t().contiguous()
        else:
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.register_parameter("weight", nn.Parameter(weight))
    linear.register_parameter("bias", layer.bias)
    return linear.train(layer.training)


# Not by their `register_...` functions, which insist on subclasses: a `QuantConfig` must not need transformers.
AUTO_QUANTIZER_MAPPING["fourbit"] = FourBitQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["fourbit"] = QuantConfig
