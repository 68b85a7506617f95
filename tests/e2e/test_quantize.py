"""`fourbit quantize`: what it writes, what it says, and what it refuses without leaving anything behind."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit

Run = Callable[..., Any]
KEYS = ["parameters", "bytes_before", "bytes_after", "bits_per_parameter", "seconds", "peak_rss_bytes"]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path, stories_model: Path) -> Path:
    """A copy of the real model that a test may spoil."""
    folder = tmp_path / "model"
    shutil.copytree(stories_model, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path, **settings: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_json(model: Path, fourbit_command: Run) -> None:
    done = fourbit_command("quantize", model, "out", "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    report = json.loads(done.out)
    assert list(report) == KEYS
    before, after = load_file(model / "model.safetensors"), load_file(model.parent / "out/model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in before.values()) == 260_032
    assert report["bytes_before"] == sum(tensor.nbytes for tensor in before.values())
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in after.values())
    assert math.isclose(report["bits_per_parameter"], 8 * report["bytes_after"] / report["parameters"])
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > report["bytes_after"]


def test_the_table_fits_a_terminal(model: Path, fourbit_here: Run) -> None:
    done = fourbit_here("quantize", model, "out", "--format", "fp4", "--no-double-quant")
    assert done.code == 0, done.err
    assert done.err == ""
    lines = [line.strip() for line in done.out.splitlines()]
    assert max(map(len, done.out.splitlines())) <= 80
    assert "format                FP4, blocks of 64" in lines
    assert "parameters            260,032" in lines


@pytest.mark.parametrize("options", [[], ["--format", "int4"], ["--no-double-quant", "--block-size", "128"]])
def test_what_is_written_is_what_python_quantizes(options: list[str], model: Path, fourbit_here: Run) -> None:
    assert fourbit_here("quantize", model, "out", *options).code == 0
    config = fourbit.QuantConfig(
        format="int4" if "int4" in options else "nf4",
        double_quant="--no-double-quant" not in options,
        block_size=128 if "128" in options else 64,
    )
    expected = fourbit.quantize(load_file(model / "model.safetensors")[WEIGHT], config).state_dict(WEIGHT)
    written = load_file(model.parent / "out/model.safetensors")
    assert {name for name in written if name.startswith(WEIGHT)} == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_skip(model: Path, fourbit_here: Run) -> None:
    assert fourbit_here("quantize", model, "out", "--skip", "up_proj", "--skip", "lm_head").code == 0
    written = load_file(model.parent / "out/model.safetensors")
    assert written[WEIGHT].dtype == torch.float32
    assert written[WEIGHT.replace("up_proj", "down_proj")].dtype == torch.uint8


def test_dry_run(model: Path, fourbit_here: Run) -> None:
    planned = json.loads(fourbit_here("quantize", model, "out", "--dry-run", "--json").out)
    assert not (model.parent / "out").exists()
    written = json.loads(fourbit_here("quantize", model, "out", "--json").out)
    assert [planned[key] for key in KEYS[:2]] == [written[key] for key in KEYS[:2]]
    assert 0 <= planned["bytes_after"] - written["bytes_after"] < 1000  # a number whose digits are not known yet


def test_overwrite(model: Path, fourbit_here: Run) -> None:
    assert fourbit_here("quantize", model, "out").code == 0
    assert "out exists" in fourbit_here("quantize", model, "out", "--format", "fp4").complaint
    assert fourbit_here("quantize", model, "out", "--format", "fp4", "--overwrite").code == 0
    (model.parent / "out/notes.txt").write_text("mine")
    assert "did not write" in fourbit_here("quantize", model, "out", "--overwrite").complaint
    assert (model.parent / "out/notes.txt").read_text() == "mine"


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def corrupt_header(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def missing_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:10]}, model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors").unlink()
    places = {name: f"model-0000{1 if name in names[:10] else 2}-of-00002.safetensors" for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"not looked at")


def not_a_number(model: Path) -> None:
    change_weights(model, lambda tensors: tensors[WEIGHT][3, 4].fill_(float("nan")))


def infinite(model: Path) -> None:
    change_weights(model, lambda tensors: tensors[WEIGHT][3, 4].fill_(float("inf")))


def wrong_shape(model: Path) -> None:
    change_weights(model, lambda tensors: tensors.update({WEIGHT: torch.ones(100, 64)}))


def missing_tensor(model: Path) -> None:
    change_weights(model, lambda tensors: tensors.pop(WEIGHT))


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama", ')


def senseless_config(model: Path) -> None:
    change_config(model, hidden_size="many")


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def unknown_architecture(model: Path) -> None:
    change_config(model, model_type="perceptron", architectures=["PerceptronForCausalLM"])


def no_model_at_all(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()
    (model / "letter.txt").write_text("Dear reader")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncated, "model.safetensors"),
        (empty, "model.safetensors"),
        (corrupt_header, "model.safetensors"),
        (missing_shard, "model-00002-of-00002.safetensors"),
        (only_a_pickle, "pytorch_model.bin"),
        (not_a_number, WEIGHT),
        (infinite, WEIGHT),
        (wrong_shape, WEIGHT),
        (missing_tensor, WEIGHT),
        (broken_config, "config.json"),
        (senseless_config, "hidden_size"),
        (no_config, "config.json"),
        (unknown_architecture, "perceptron"),
        (no_model_at_all, "model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_model(spoil: Callable[[Path], None], named: str, model: Path, fourbit_here: Run) -> None:
    spoil(model)
    assert named in fourbit_here("quantize", model, "out").complaint
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model", "out", "--format", "nf5"], "'nf5'"),
        (["model", "out", "--block-size", "48"], "48"),
        (["model", "out", "--block-size", "-64"], "-64"),
        (["no/such/folder", "out"], "no/such/folder"),
        (["model/config.json", "out"], "model/config.json"),
        (["an-organisation/a-model", "out"], "an-organisation/a-model"),
        (["model", "model"], "model"),
        (["model", "model/config.json"], "model/config.json"),
        (["model", "model/config.json/out"], "model/config.json"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], named: str, model: Path, fourbit_here: Run) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert named in fourbit_here("quantize", *arguments).complaint
    assert [path.name for path in model.parent.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize(("options", "named"), [("size=128k", "the disk is full"), ("ro", "the disk is read-only")])
def test_a_disk_that_takes_nothing(options: str, named: str, model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("a disk cannot be mounted here")
    script = f"{mount} && {sys.executable} -m fourbit quantize {model} {disk}/out; echo $?; ls -A {disk}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "2\n"  # and nothing is left on the disk
    (line,) = done.stderr.splitlines()
    assert named in line
