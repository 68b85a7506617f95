"""The Triton kernels through Triton's compiler, which needs no GPU: that it takes them, and what it makes of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).with_name("triton_kernels.py")

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# what `kernels.triton.linear.choose` takes on a Hopper, and a weight's way there and back
CHOSEN = [
    "quantize_absmax sm_90",
    "dequantize_absmax sm_90",
    "quantize bf16 64 sm_90",
    "dequantize bf16 64 True sm_90",
    "matvec bf16 gather 16 sm_90",
    "skinny bf16 permute 16 sm_90",
    "skinny bf16 permute 64 sm_90",
    "add_splits bf16 sm_90",
    "matvec fp16 gather 16 sm_75",
    "dequantize fp16 64 True sm_75",
    "rotary bf16 False sm_90",
    "rms_norm bf16 sm_90",
    "rms_norm_backward bf16 sm_90",
    "swiglu bf16 True sm_90",
    "swiglu_backward bf16 True sm_90",
    "cross_entropy bf16 False sm_90",
    "cross_entropy fp16 True sm_75",
    "adamw bf16 sm_90",
]

BOUNDED = ("matvec", "skinny", "rms_norm", "swiglu", "cross_entropy")
"""Those whose contract is a bound and not the reference's bits: exponentials and roots are the GPU's."""


def compiled(cache: Path, *names: str) -> dict[str, Any]:
    """What `triton_kernels.py` prints, from a process in which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(KERNELS), *names],
        check=False,
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled(tmp_path_factory.mktemp("triton"), *CHOSEN)


def test_those_that_are_chosen_compile(chosen: dict[str, Any]) -> None:
    assert set(chosen) == set(CHOSEN)


@pytest.mark.parametrize("name", [name for name in CHOSEN if not name.startswith(BOUNDED)])
def test_rounding_is_that_of_the_reference(chosen: dict[str, Any], name: str) -> None:
    """No product and sum in one, no division but the exact one, no subnormal number taken for zero."""
    found = chosen[name]
    assert found["fma"] == 0
    assert not {"ftz", "div.full", "div.approx"} & set(found["has"])
    assert ("div.rn" in found["has"]) == ("adamw" in name or ("quantize" in name and "dequantize" not in name))


def test_products_read_and_multiply_as_they_are_meant_to(chosen: dict[str, Any]) -> None:
    """Sixteen bytes of codes at a time; through asynchronous copies into the tensor cores from two tokens on."""
    assert "ld.global.v4" in chosen["matvec bf16 gather 16 sm_90"]["has"]
    for name in ("skinny bf16 permute 16 sm_90", "skinny bf16 permute 64 sm_90"):
        assert {"wgmma", "cp.async"} <= set(chosen[name]["has"])


@pytest.mark.slow
def test_every_variant_compiles_for_every_architecture(tmp_path: Path) -> None:
    found = compiled(tmp_path)
    assert len(found) > 100
    exact = [name for name in found if not name.startswith(BOUNDED)]
    assert [name for name in exact if found[name]["fma"] or "ftz" in found[name]["has"]] == []
    assert max(entry["shared"] for entry in found.values()) <= 96 * 1024  # of one program; sm_86 has 99 KiB
