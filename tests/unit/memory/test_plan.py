"""`fourbit.plan`: its parts, its published numbers, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fourbit
from fourbit.errors import InputError, NotAModel
from fourbit.memory.knobs import Knobs
from fourbit.memory.plan import PARTS, Planner, plan

GPU = {"adapter_dtype": "bfloat16", "device": "cuda", "optimizer": "none"}


PUBLISHED = [
    ("llama-7b", 5, 4.9),
    pytest.param("llama-13b", 9, 8.8, marks=pytest.mark.slow),
    pytest.param("llama-33b", 21, 20.2, marks=pytest.mark.slow),
    pytest.param("llama-65b", 40, 38.9, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "bar", "counted"), PUBLISHED)
def test_published_shapes_fit_where_the_design_says(shape: str, bar: float, counted: float) -> None:
    """Batch 1 x 512, r = 64, checkpointing, bf16 adapters, states paged out; `counted` is an independent count."""
    found = plan(shape, **GPU)  # type: ignore[arg-type]
    assert found.total_bytes <= bar * 1e9
    assert found.total_bytes == pytest.approx(counted * 1e9, rel=0.035)
    assert sum(found.parts.values()) == found.total_bytes
    assert list(found.parts) == list(PARTS)
    assert found.context_bytes > 0
    states = plan(shape, **{**GPU, "optimizer": "paged_adamw_32bit"})  # type: ignore[arg-type]
    assert states.parts["optimizer"] == 8 * states.trainable


def test_every_knob_moves_its_part() -> None:
    planner = Planner("llama-135m", process_bytes=0)
    plain = Knobs(batch_size=2, sequence_length=128, rank=16)
    before = planner.plan(plain).parts

    def after(**changes: Any) -> dict[str, int]:
        return dict(planner.plan(plain.with_(**changes)).parts)

    assert after(checkpointing=False)["activations"] > 2 * before["activations"]
    assert after(rank=32)["adapters"] == 2 * before["adapters"]
    assert after(adapter_dtype="bfloat16")["optimizer"] == before["optimizer"] // 2
    assert after(double_quant=False)["scales"] > 3.5 * before["scales"]
    assert after(block_size=128)["scales"] < 0.51 * before["scales"]
    assert after(format="none")["weights_4bit"] == 0
    assert after(vocabulary=64_000)["weights_16bit"] > 1.9 * before["weights_16bit"]
    assert after(optimizer="paged_adamw_8bit")["optimizer"] < 0.3 * before["optimizer"]
    assert after(optimizer="paged_adamw_32bit", optimizer_budget_bytes=1 << 20)["optimizer"] == 1 << 20
    paged = {"optimizer": "paged_adamw_32bit", "adapter_dtype": "bfloat16"}
    assert after(**paged, master_weights=True)["optimizer"] == 1.5 * after(**paged)["optimizer"]
    assert after(batch_size=4)["activations"] > before["activations"]
    assert after(packed=True)["activations"] == before["activations"] + 256**2
    assert after(target_modules=("q_proj",))["adapters"] < before["adapters"] / 5


def test_what_pages_keep_elsewhere_is_on_the_host() -> None:
    found = plan("tiny", **{**GPU, "optimizer": "paged_adamw_32bit", "optimizer_budget_bytes": 1000})  # type: ignore[arg-type]
    assert found.parts["optimizer"] == 1000
    assert found.host_bytes == 8 * found.trainable - 1000


def test_it_fits_or_not() -> None:
    found = plan("tiny", process_bytes=10**9, device="cpu")
    assert found.fits(found.total_bytes)
    assert not found.fits(found.total_bytes - 1)
    on_gpu = plan("tiny", **GPU)  # type: ignore[arg-type]
    assert not on_gpu.fits(on_gpu.total_bytes)  # the context is to fit as well
    assert on_gpu.fits(on_gpu.needed_bytes)


def test_a_folder_a_file_and_a_configuration_give_the_same(stories_model: Path, tmp_path: Path) -> None:
    shutil.copy(stories_model / "config.json", tmp_path)  # no weights
    from transformers import AutoConfig

    given = (stories_model, tmp_path, tmp_path / "config.json", AutoConfig.from_pretrained(tmp_path))
    found = [plan(each, sequence_length=64, process_bytes=0).parts for each in given]
    assert all(each == found[0] for each in found)


def test_a_folder_in_four_bits_keeps_what_it_has(stories_model: Path, tmp_path: Path) -> None:
    model = fourbit.load(stories_model, fourbit.QuantConfig(double_quant=False))
    model.save_pretrained(tmp_path)
    found = plan(tmp_path, sequence_length=64, process_bytes=0)
    plain = plan(stories_model, sequence_length=64, process_bytes=0, double_quant=False)
    assert found.parts["scales"] == plain.parts["scales"]
    with pytest.raises(InputError, match="is in 4 bits already"):
        plan(tmp_path, format="none", process_bytes=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"sequence_length": -1}, "`sequence_length` is -1"),
        ({"sequence_length": 512.0}, "must be a whole number"),
        ({"rank": True}, "`rank` is True"),
        ({"sequence_length": 4096}, "was made for 2048 tokens"),
        ({"dropout": 1.0}, "`dropout` is 1.0"),
        ({"optimizer": "sgd"}, "`optimizer` is 'sgd'"),
        ({"device": "tpu"}, "`device` is 'tpu'"),
        ({"optimizer_budget_bytes": -1}, "0 or more"),
        ({"format": "nf5"}, "nf5"),
        ({"vocabulary": 0}, "`vocabulary` is 0"),
    ],
    ids=str,
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan("tiny", **changes, process_bytes=0)


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match="There is no folder"):
        plan("llama-8b-or-so", process_bytes=0)
    with pytest.raises(NotAModel, match=r"holds no config\.json"):
        plan(tmp_path, process_bytes=0)


def test_to_dict_is_json() -> None:
    keys = json.loads(json.dumps(plan("tiny", process_bytes=0).to_dict()))
    assert keys["total_bytes"] == sum(keys["parts"].values())


QUICK_ROWS = [
    1,
    pytest.param(0, marks=pytest.mark.slow),
    *(pytest.param(row, marks=pytest.mark.slow) for row in (2, 3)),
]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident size is read from /proc")
@pytest.mark.parametrize("row", QUICK_ROWS)
def test_the_plan_is_within_a_tenth_of_the_peak_resident_size(row: int, repository: Path, tmp_path: Path) -> None:
    """A real run in a process of its own; benchmarks/plan_cpu.py has the whole grid."""
    script = repository / "benchmarks" / "plan_cpu.py"
    code = f"import plan_cpu, pathlib; print(plan_cpu.measure(plan_cpu.QUICK[{row}], pathlib.Path('.'))['error'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{script.parent}:{repository / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout.splitlines()[-1])) <= 0.10
