"""What is said where Triton's kernels cannot run, and which tensors they take where they can."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from fourbit.kernels import dispatch, ops, triton
from fourbit.kernels.triton import launch


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is found once a process; here once a test."""
    monkeypatch.setattr(launch, "_reason", {})
    for operation in list(dispatch.OPERATIONS.values()):
        monkeypatch.setattr(operation, "_fast", {})


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would say of a GPU from 2016, as far as it is asked."""
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GeForce GTX 1080")


def test_a_gpu_that_is_too_old(a_gpu: None) -> None:
    reason = triton.unavailable()
    assert reason == "GeForce GTX 1080 has compute capability 6.1 and Triton needs 7.0; plain torch runs instead"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED", True)
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = triton.unavailable()
    assert reason is not None
    assert "`pip install triton`" in reason
    assert "plain torch runs instead" in reason


def test_a_triton_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def broken() -> None:
        raise RuntimeError("no C compiler was found\nand more lines")

    monkeypatch.setattr(launch, "_INTERPRETED", True)
    monkeypatch.setattr(launch, "_probe", broken)
    reason = triton.unavailable()
    assert reason is not None
    assert "cannot compile a trivial kernel here (no C compiler was found); plain torch runs instead" in reason
    with dispatch.use("auto"):
        assert ops.quantize_blocks(torch.ones(64))[0].numel() == 32
    with dispatch.use("triton"), pytest.raises(RuntimeError, match="no C compiler was found"):
        ops.quantize_blocks(torch.ones(64))


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch is built for CUDA")
def test_a_torch_for_cpus_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "has an NVIDIA GPU, but torch" in str(triton.unavailable())
    assert "install a CUDA build of torch" in str(triton.unavailable())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    launch._reason.clear()
    assert triton.unavailable() == "torch sees no GPU"


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_backend_does_not_take_another_ones_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    other = {"native": "meta", "triton": "cpu"}[name]
    reason = dispatch.OPERATIONS["linear"]._load(name, other)
    assert reason == f"{name} has no kernels for {other} devices"


def test_the_products_tell_how_they_choose() -> None:
    if triton.unavailable() is not None:
        pytest.skip(str(triton.unavailable()))
    with dispatch.use("triton"):
        explained = dispatch.explain("cuda" if torch.cuda.is_available() else "cpu")
    assert {explained[name]["backend"] for name in ("linear", "lora_linear", "dequantize_blocks")} == {"triton"}
    for name in ("linear", "lora_linear_backward"):
        assert "1 token by matvec, to 64" in explained[name]["why"]
        assert "cuBLAS" in explained[name]["why"]
    assert "matvec" not in explained["quantize_blocks"]["why"]
    assert explained["attention"] == {"backend": "reference", "why": "triton has no kernel for it"}


def test_importing_the_package_imports_no_triton() -> None:
    """So that it costs nothing, and breaks nothing, where no tensor is on a GPU."""
    code = "import sys; from fourbit.kernels import triton, ops; triton.devices(); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
