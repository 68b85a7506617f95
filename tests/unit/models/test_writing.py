"""The safetensors writer against the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fourbit.models.checkpoint import read_header
from fourbit.models.writing import Planned, SafetensorsWriter


def tensors() -> dict[str, Tensor]:
    """Sizes that would leave their successors unaligned."""
    return {
        "bytes": torch.arange(7, dtype=torch.uint8).view(7, 1),
        "double": torch.tensor([1.5, -2.5], dtype=torch.float64),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "half": torch.randn(3, 5).half(),
        "naïve ☃": torch.tensor([True]),
        "scalar": torch.tensor(2.5),
        "view": torch.randn(4, 6).t(),
    }


def plan(given: dict[str, Tensor]) -> dict[str, Planned]:
    return {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}


@pytest.mark.parametrize("backwards", [False, True])
def test_the_library_reads_it(tmp_path: Path, backwards: bool) -> None:
    given, path = tensors(), tmp_path / "model.safetensors"
    planned = plan(given) | {
        "late": Planned(torch.uint8, (300,), exact=False),
        "none": Planned(torch.uint8, (9,), False),
    }
    given |= {"late": torch.arange(11, dtype=torch.uint8), "none": torch.empty(0, dtype=torch.uint8)}
    writer = SafetensorsWriter(path, planned)
    for name in sorted(given, reverse=backwards):
        writer.write(name, given[name])
    writer.finish()
    found = load_file(path)
    assert found.keys() == given.keys()
    assert all(found[name].dtype == given[name].dtype and torch.equal(found[name], given[name]) for name in given)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {entry.name for entry in read_header(path)} == given.keys()
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert length % 8 == 0
    for entry in read_header(path):
        assert entry.offset % entry.dtype.itemsize == 0, "every tensor must be aligned"
    assert json.loads(path.read_bytes()[8 : 8 + length])


def test_only_what_was_planned(tmp_path: Path) -> None:
    writer = SafetensorsWriter(
        tmp_path / "a", {"x": Planned(torch.float32, (2,)), "y": Planned(torch.uint8, (2,), False)}
    )
    for name, tensor in {
        "z": torch.ones(2),
        "x": torch.ones(3),
        "y": torch.ones(3, dtype=torch.uint8),
    }.items():
        with pytest.raises(ValueError, match=f"The tensor {name}"):
            writer.write(name, tensor)
    writer.close()


def test_everything_that_was_planned(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a", {"x": Planned(torch.float32, (2,))})
    with pytest.raises(ValueError, match="not written, such as x"):
        writer.finish()
    writer.close()


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "a", {})
    assert (tmp_path / "a").read_text() == "mine"
