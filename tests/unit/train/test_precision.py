"""What a run computes in on machines that lack what it asks for, each pretended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fourbit.train.config import TrainConfig
from fourbit.train.precision import settle_precision


def config(**settings: str) -> TrainConfig:
    return TrainConfig(model="m", data="d", output="o", **settings)


@pytest.fixture(autouse=True)
def products_as_before() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    yield
    matmul.allow_fp16_reduced_precision_reduction = before


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, with or without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: request.param or including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("gpu", [False], indirect=True)
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_a_gpu_without_bfloat16_trains_in_float16(adapter_dtype: str) -> None:
    settled, sentence = settle_precision(config(adapter_dtype=adapter_dtype))
    assert (settled.dtype, settled.adapter_dtype) == ("float16", "float32")
    assert sentence is not None
    assert "Tesla T4 has no bfloat16" in sentence
    assert "float16 with a scaled loss instead" in sentence
    assert ("adapter" in sentence) == (adapter_dtype != "float32")
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("gpu", [True], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_with_bfloat16_computes_in_what_was_asked_for(dtype: str) -> None:
    assert settle_precision(config(dtype=dtype)) == (config(dtype=dtype), None)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_there_is_no_float16() -> None:
    settled, sentence = settle_precision(config(dtype="float16"))
    assert settled.dtype == "bfloat16"
    assert sentence is not None
    assert "bfloat16 instead" in sentence
    for dtype in ("bfloat16", "float32"):
        assert settle_precision(config(dtype=dtype)) == (config(dtype=dtype), None)
