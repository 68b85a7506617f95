"""The layout on disk: every key, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fourbit.errors import BrokenCheckpoint
from fourbit.formats import CODEBOOKS, NF4, dynamic_map
from fourbit.quant import QuantConfig, QuantizedTensor, quantize


def written(name: str = "w", **settings: Any) -> dict[str, Tensor]:
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return quantize(weight, QuantConfig(**settings)).state_dict(name)


def state_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    (key,) = [key for key in tensors if ".quant_state." in key]
    state: dict[str, Any] = json.loads(bytes(tensors[key].numpy()).decode())
    return state


def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The same tensors with fields of the JSON part changed; a field set to None is removed."""
    (key,) = [key for key in tensors if ".quant_state." in key]
    state = {k: v for k, v in (state_of(tensors) | changes).items() if v is not None}
    return tensors | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def test_the_keys_are_bitsandbytes_keys() -> None:
    tensors = written()
    assert set(tensors) == {
        "w",
        "w.absmax",
        "w.quant_map",
        "w.nested_absmax",
        "w.nested_quant_map",
        "w.quant_state.bitsandbytes__nf4",
    }
    assert tensors["w"].shape == (33 * 70 // 2, 1)
    assert tensors["w.absmax"].dtype == torch.uint8
    assert torch.equal(tensors["w.quant_map"], torch.tensor(NF4.levels))
    assert torch.equal(tensors["w.nested_quant_map"], torch.from_numpy(dynamic_map()))


def test_the_state_stands_in_bitsandbytes_order() -> None:
    expected = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
    state = state_of(written())
    assert list(state) == expected
    assert state["shape"] == [33, 70]
    assert state["dtype"] == "bfloat16"
    assert list(state_of(written(double_quant=False))) == expected[:4]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", CODEBOOKS)
def test_round_trip_through_safetensors(format: str, double_quant: bool) -> None:
    tensors = written(format=format, double_quant=double_quant, block_size=128)
    read = QuantizedTensor.from_state_dict(load(save(tensors)), "w")
    again = read.state_dict("w")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert (read.format, read.block_size, read.double_quant) == (format, 128, double_quant)
    assert read.dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["int4", "nf3", "nf2"])
def test_a_format_that_bitsandbytes_lacks_bears_our_name(format: str) -> None:
    assert f"w.quant_state.fourbit__{format}" in written(format=format)


def test_other_tensors_in_the_file_do_not_matter() -> None:
    tensors = {**written("a.weight"), **written("a.weight2", format="fp4"), "a.bias": torch.ones(3)}
    assert QuantizedTensor.from_state_dict(tensors, "a.weight").format == "nf4"
    assert QuantizedTensor.from_state_dict(tensors, "a.weight2").format == "fp4"


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(key: str) -> Change:
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def instead(key: str, value: Tensor) -> Change:
    return lambda tensors: tensors | {key: value}


def state(**changes: Any) -> Change:
    return lambda tensors: with_state(tensors, **changes)


BROKEN: dict[str, tuple[Change, str]] = {
    "no codes": (without("w"), "The tensor w is missing"),
    "no scales": (without("w.absmax"), "w.absmax is missing"),
    "no nested scales": (without("w.nested_absmax"), "w.nested_absmax is missing"),
    "no map": (without("w.quant_map"), "w.quant_map is missing"),
    "no state": (without("w.quant_state.bitsandbytes__nf4"), "0 quant_state entries instead of one"),
    "two states": (instead("w.quant_state.bitsandbytes__fp4", torch.ones(2)), "2 quant_state entries"),
    "codes too short": (
        instead("w", torch.zeros(5, 1, dtype=torch.uint8)),
        "5 elements of torch.uint8; it must have 1155",
    ),
    "codes of another dtype": (instead("w", torch.zeros(1155, 1)), "1155 elements of torch.float32"),
    "scales of another dtype": (instead("w.absmax", torch.zeros(37)), "37 elements of torch.float32"),
    "another codebook": (instead("w.quant_map", torch.linspace(-1, 1, 16)), "other values than the format's own"),
    "a codebook of NaN": (instead("w.quant_map", torch.full((16,), torch.nan)), "other values than the format's own"),
    "another 8-bit map": (instead("w.nested_quant_map", torch.zeros(256)), "other values"),
    "no JSON": (instead("w.quant_state.bitsandbytes__nf4", torch.ones(9, dtype=torch.uint8)), "is not the JSON"),
    "not bytes": (instead("w.quant_state.bitsandbytes__nf4", torch.full((4,), 1e9)), "is not the JSON"),
    "empty JSON": (
        instead("w.quant_state.bitsandbytes__nf4", torch.tensor(list(b"{}"), dtype=torch.uint8)),
        "not the JSON",
    ),
    "JSON of another kind": (
        instead("w.quant_state.bitsandbytes__nf4", torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        "not the JSON",
    ),
    "no shape": (state(shape=None), "not the JSON"),
    "a shape that does not fit": (state(shape=[33, 71]), "1155 elements of torch.uint8; it must have 1172"),
    "a negative shape": (state(shape=[-33, -70]), "no known writer makes"),
    "a shape of strings": (state(shape=["33", "70"]), "no known writer makes"),
    "a huge shape": (state(shape=[1 << 62, 1 << 62]), "it must have"),
    "another block size": (state(blocksize=128), "must have 19 of"),
    "an impossible block size": (state(blocksize=48), "block size is 48"),
    "a block size of text": (state(blocksize="64"), "cannot be read|not the JSON"),
    "an unknown format": (state(quant_type="nf9"), "no 4-bit format named 'nf9'"),
    "a format under another's key": (state(quant_type="fp4"), "no known writer"),
    "an unknown dtype": (state(dtype="float8"), "no known writer"),
    "an offset that is no number": (state(nested_offset="0"), "no known writer|not the JSON"),
    "an infinite offset": (state(nested_offset=float("inf")), "no known writer"),
    "another nested block size": (state(nested_blocksize=128), "no known writer"),
    "nested scales without an offset": (state(nested_offset=None), "w.absmax has 37 elements of torch.uint8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_the_reason(case: str) -> None:
    change, reason = BROKEN[case]
    with pytest.raises(BrokenCheckpoint, match=reason):
        QuantizedTensor.from_state_dict(change(written()), "w")


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(BrokenCheckpoint, match="quantized tensor v has 0 quant_state entries"):
        QuantizedTensor.from_state_dict(written(), "v")
