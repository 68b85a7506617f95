"""QuantConfig: what it accepts, and that it needs no torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from fourbit.errors import InputError, InvalidBlockSize, UnknownFormat
from fourbit.formats import NF4
from fourbit.quant import QuantConfig


def test_the_default_is_qlora() -> None:
    config = QuantConfig()
    assert (config.format, config.block_size, config.double_quant) == ("nf4", 64, True)
    assert config.codebook is NF4
    assert config.torch_compute_dtype is None


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_a_compute_dtype_by_name_or_as_torch_has_it(given: str | torch.dtype) -> None:
    config = QuantConfig(compute_dtype=given)
    assert config.compute_dtype == "bfloat16"
    assert config.torch_compute_dtype is torch.bfloat16
    assert config == QuantConfig(compute_dtype="bfloat16")


def test_skip_takes_one_name_or_several() -> None:
    assert QuantConfig(skip="head").skip == ("head",)
    assert QuantConfig(skip=["a", "b"]).skip == ("a", "b")
    assert QuantConfig(skip=()).skip == ()


def test_what_is_refused() -> None:
    with pytest.raises(UnknownFormat, match="nf5"):
        QuantConfig(format="nf5")
    with pytest.raises(InvalidBlockSize, match="block size is 48"):
        QuantConfig(block_size=48)
    with pytest.raises(InputError, match="compute dtype is 'int8'; it must be one of float32, bfloat16, float16"):
        QuantConfig(compute_dtype=torch.int8)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"format": ["nf4"]}, r"The format is \['nf4'\]; it must be a name"),
        ({"block_size": 64.0}, "The block size is 64.0; it must be a whole number"),
        ({"block_size": True}, "The block size is True; it must be a power of two"),
        ({"double_quant": "yes"}, "double_quant is 'yes'; it must be True or False"),
        ({"compute_dtype": ["float16"]}, "compute dtype is .* must be one of"),
        ({"skip": 5}, "skip is 5; it must be a name of a module, or a list of names"),
        ({"skip": [5]}, r"skip is \[5\]; it must be a name of a module, or a list of names"),
        ({"skip": ""}, "A name in skip is empty"),
        ({"skip": ("head", "")}, "A name in skip is empty"),
    ],
)
def test_a_wrong_kind_of_value_is_refused_alike_in_python_and_in_json(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        QuantConfig(**given)
    with pytest.raises(InputError, match=f"quantization_config of these weights makes no sense: .*{says}"):
        QuantConfig.from_dict({"quant_method": "fourbit", **given})


def test_it_is_a_value() -> None:
    assert QuantConfig() == QuantConfig()
    assert hash(QuantConfig(skip=["a"])) == hash(QuantConfig(skip=("a",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().format = "fp4"  # type: ignore[misc]


def test_it_imports_no_torch() -> None:
    code = "import sys, fourbit; fourbit.QuantConfig(compute_dtype='float16'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
