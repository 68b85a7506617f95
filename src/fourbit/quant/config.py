"""How a weight is quantized: one plain dataclass, which imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from fourbit.errors import InputError, InvalidBlockSize, UnknownFormat
from fourbit.formats import Codebook, check_block_size, codebook

if TYPE_CHECKING:
    import torch

__all__ = ["BITSANDBYTES_FORMATS", "COMPUTE_DTYPES", "NOT_QUANTIZED", "QuantConfig", "chosen_config"]

BITSANDBYTES_FORMATS = ("nf4", "fp4")
"""The formats that bitsandbytes reads; a folder in another one is marked as ours alone."""

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")

NOT_QUANTIZED = "none"
"""In the place of a format: the model stays in 16 bits."""


@dataclass(frozen=True)
class QuantConfig:
    """How a weight is quantized and computed with.

    Attributes:
        format: what a 4-bit code means: `nf4`, `fp4`, `int4`, `nf3` or `nf2`. bitsandbytes reads the first two.
        block_size: elements per scale, a power of two from 32 to 4096.
        double_quant: keep the scales themselves in 8 bits, which saves 0.37 bits per parameter at block size 64.
        compute_dtype: what products run in, as a name or a torch dtype; None takes the dtype of the input.
        skip: names of modules to leave as they are (a whole name, or a dotted part of one). None leaves what is usually
            left: the output head; an empty tuple leaves nothing. Embeddings are never quantized.

    Raises:
        UnknownFormat, InvalidBlockSize, InputError (double_quant, compute_dtype, skip).
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: str | torch.dtype | None = None
    skip: Sequence[str] | None = None

    def __post_init__(self) -> None:
        # What is no string or no int came from a config.json, or from where no type checker looked.
        if not isinstance(self.format, str):
            raise UnknownFormat(f"The format is {self.format!r}; it must be a name, such as 'nf4'.")
        codebook(self.format)
        if not isinstance(self.block_size, int):  # 64.0 equals 64, and a kernel cannot take it
            raise InvalidBlockSize(f"The block size is {self.block_size!r}; it must be a whole number, such as 64.")
        check_block_size(self.block_size)
        if not isinstance(self.double_quant, bool):
            raise InputError(f"double_quant is {self.double_quant!r}; it must be True or False.")
        if self.compute_dtype is not None:
            name = str(self.compute_dtype).removeprefix("torch.")
            if name not in COMPUTE_DTYPES:
                raise InputError(f"The compute dtype is {name!r}; it must be one of {', '.join(COMPUTE_DTYPES)}.")
            object.__setattr__(self, "compute_dtype", name)
        if self.skip is not None:
            object.__setattr__(self, "skip", _names(self.skip))

    @property
    def codebook(self) -> Codebook:
        """The levels of the format."""
        return codebook(self.format)

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as torch names it."""
        if self.compute_dtype is None:
            return None
        import torch

        dtype: torch.dtype = getattr(torch, str(self.compute_dtype))
        return dtype

    @property
    def quant_method(self) -> str:
        """The name under which transformers finds our quantizer.

        transformers takes any object with this attribute as a `quantization_config`, and has no entry point by which a
        quantizer could announce itself. So ours is registered when transformers asks for the name.
        """
        importlib.import_module("fourbit.models.quantizer")  # by name: nothing in quant depends on models
        return "fourbit"

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` of a quantized folder says: bitsandbytes' own settings where it knows the format.

        bitsandbytes keeps no block size there, as each tensor carries its own.
        """
        if self.format not in BITSANDBYTES_FORMATS:
            return {"quant_method": "fourbit", **asdict(self)}
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": self.compute_dtype or "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.format,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": None if self.skip is None else list(self.skip),
            "llm_int8_threshold": 6.0,
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **kwargs: Any) -> QuantConfig:
        """Read what `to_dict`, or bitsandbytes, wrote.

        Args:
            settings: the `quantization_config` of a config.json.
            kwargs: transformers passes some, which do not concern us.

        Raises:
            InputError: they are of another method than 4 bits, or make no sense.
        """
        method = settings.get("quant_method")
        if method == "fourbit":
            return cls._read({field.name: settings[field.name] for field in fields(cls) if field.name in settings})
        if method == "bitsandbytes" and settings.get("load_in_4bit"):
            return cls._read(
                {
                    "format": settings.get("bnb_4bit_quant_type", "fp4"),
                    "double_quant": settings.get("bnb_4bit_use_double_quant", False),
                    "compute_dtype": settings.get("bnb_4bit_compute_dtype"),
                    "skip": settings.get("llm_int8_skip_modules"),
                }
            )
        raise InputError(
            f"These weights are quantized by {_method(settings)}; those in 16 bits can be read, and those in 4 bits of"
            " bitsandbytes and of fourbit."
        )

    @classmethod
    def _read(cls, given: Mapping[str, Any]) -> QuantConfig:
        try:
            return cls(**given)
        except InputError as error:
            raise type(error)(f"The quantization_config of these weights makes no sense: {error}") from error


def _names(skip: object) -> tuple[str, ...]:
    """The names to skip: one, or several."""
    names = (skip,) if isinstance(skip, str) else skip
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"skip is {skip!r}; it must be a name of a module, or a list of names.")
    if not all(names):  # it would match the whole model
        raise InputError("A name in skip is empty; give the name of a module, such as 'lm_head'.")
    return tuple(names)


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    return f"{method} to 8 bits" if method == "bitsandbytes" else str(method)


def chosen_config(format: str | None, block_size: int | None, double_quant: bool | None) -> QuantConfig | None:
    """What three settings that may each be left out (None) ask for together.

    Returns:
        None where nothing was asked for, so that a model in 4 bits keeps what it has, and for NOT_QUANTIZED.

    Raises:
        InputError: they contradict each other, or one makes no sense.
    """
    settings = {"format": format, "block_size": block_size, "double_quant": double_quant}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if format == NOT_QUANTIZED and len(given) > 1:
        raise InputError(f"A block size and double quantization go with a format; {NOT_QUANTIZED} quantizes nothing.")
    return QuantConfig(**given) if given and format != NOT_QUANTIZED else None
