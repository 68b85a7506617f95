"""A quantized tensor on disk: bitsandbytes' layout, key by key.

    NAME                                  uint8 [ceil(n/2), 1]   packed codes
    NAME.absmax                           fp32 [G], or uint8 [G] under double quantization
    NAME.quant_map                        fp32 [16]              the levels by code
    NAME.nested_absmax                    fp32 [ceil(G/256)]     } under double quantization
    NAME.nested_quant_map                 fp32 [256]             }
    NAME.quant_state.bitsandbytes__nf4    uint8                  the rest as the bytes of a JSON object

The last key ends in the format's name. For formats that bitsandbytes does not know it is `quant_state.fourbit__int4`,
so that it refuses such a file instead of misreading it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourbit.errors import BrokenCheckpoint, InputError
from fourbit.formats import (
    CODEBOOKS,
    NESTED_BLOCK_SIZE,
    block_count,
    check_block_size,
    codebook,
    dynamic_map,
    packed_size,
)
from fourbit.quant.config import BITSANDBYTES_FORMATS

if TYPE_CHECKING:
    from fourbit.quant.tensor import QuantizedTensor

__all__ = ["STATISTICS", "read", "read_state", "state_key", "write"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def state_key(format: str) -> str:
    """The suffix under which the JSON part of a format stands."""
    owner = "bitsandbytes" if format in BITSANDBYTES_FORMATS else "fourbit"
    return f"quant_state.{owner}__{format}"


STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *map(state_key, CODEBOOKS))
"""Every suffix that can stand behind a quantized weight's name."""


def write(tensor: QuantizedTensor, name: str) -> dict[str, Tensor]:
    """The tensors of one quantized weight, by key."""
    state: dict[str, Any] = {
        "quant_type": tensor.format,
        "blocksize": tensor.block_size,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    tensors = {
        name: tensor.packed.view(-1, 1),
        f"{name}.absmax": tensor.absmax,
        f"{name}.quant_map": tensor.levels.clone(),  # safetensors refuses tensors that share memory
    }
    if tensor.nested_absmax is not None and tensor.nested_offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": tensor.nested_offset.item(),
        }
        tensors[f"{name}.nested_absmax"] = tensor.nested_absmax
        tensors[f"{name}.nested_quant_map"] = torch.from_numpy(dynamic_map().copy()).to(tensor.device)
    tensors[f"{name}.{state_key(tensor.format)}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def read(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The fields of a `QuantizedTensor` from the tensors under its name.

    Raises:
        BrokenCheckpoint: names the tensor and what is wrong with it.
    """
    state = read_state(tensors, name)
    elements, block_size = math.prod(state["shape"]), state["blocksize"]
    blocks = block_count(elements, block_size)
    nested = "nested_offset" in state
    packed = _part(tensors, name, torch.uint8, packed_size(elements))
    absmax = _part(tensors, f"{name}.absmax", torch.uint8 if nested else torch.float32, blocks)
    _check_map(tensors, f"{name}.quant_map", torch.from_numpy(codebook(state["quant_type"]).table), atol=1e-6)
    nested_absmax = nested_offset = None
    if nested:
        nested_blocks = block_count(blocks, NESTED_BLOCK_SIZE)
        nested_absmax = _part(tensors, f"{name}.nested_absmax", torch.float32, nested_blocks)
        nested_offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        _check_map(tensors, f"{name}.nested_quant_map", torch.from_numpy(dynamic_map()), atol=0)
    return {
        "packed": packed,
        "absmax": absmax,
        "nested_absmax": nested_absmax,
        "nested_offset": nested_offset,
        "shape": torch.Size(state["shape"]),
        "dtype": _DTYPES[state["dtype"]],
        "format": state["quant_type"],
        "block_size": block_size,
    }


def read_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON part, with every field checked.

    Raises:
        BrokenCheckpoint: names the key and what is wrong with it.
    """
    keys = [key for key in tensors if key.startswith(f"{name}.quant_state.")]
    if len(keys) != 1:
        raise BrokenCheckpoint(f"The quantized tensor {name} has {len(keys)} quant_state entries instead of one.")
    key = keys[0]
    try:
        state = json.loads(bytes(tensors[key].cpu().numpy()).decode())
        shape, offset = list(state["shape"]), state.get("nested_offset", 0.0)
        check_block_size(state["blocksize"])
        codebook(state["quant_type"])
        known = (
            state["dtype"] in _DTYPES
            and all(type(size) is int and size >= 0 for size in shape)
            and key == f"{name}.{state_key(state['quant_type'])}"
            and state.get("nested_blocksize", NESTED_BLOCK_SIZE) == NESTED_BLOCK_SIZE
            and state.get("nested_dtype", "float32") == "float32"
            and isinstance(offset, (int, float))
            and math.isfinite(offset)
        )
    except InputError as error:
        raise BrokenCheckpoint(f"{key} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{key} is not the JSON that describes a 4-bit tensor ({error!r}).") from error
    if not known:
        raise BrokenCheckpoint(f"{key} describes a tensor that no known writer makes: {json.dumps(state)[:200]}.")
    return dict(state)


def _part(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype, elements: int) -> Tensor:
    """One tensor, flat, of the dtype and size it must have."""
    if key not in tensors:
        raise BrokenCheckpoint(f"The tensor {key} is missing.")
    tensor = tensors[key]
    if tensor.dtype != dtype or tensor.numel() != elements:
        raise BrokenCheckpoint(
            f"The tensor {key} has {tensor.numel()} elements of {tensor.dtype}; it must have {elements} of {dtype}."
        )
    return tensor.reshape(-1)


def _check_map(tensors: Mapping[str, Tensor], key: str, expected: Tensor, *, atol: float) -> None:
    """Refuse a file whose codes stand for other values than ours: decoding it by our table would be silently wrong."""
    given = _part(tensors, key, torch.float32, expected.numel())
    if not torch.allclose(given.cpu(), expected, rtol=0, atol=atol):
        raise BrokenCheckpoint(f"The tensor {key} holds other values than the format's own.")
