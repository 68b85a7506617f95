"""The report: one file, everything in it, nothing from elsewhere."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from fourbit.train import TrainConfig
from fourbit.train.charts import Series, draw, smooth
from fourbit.train.report import model_arguments, write_report
from fourbit.train.samples import Sample


def metrics(**changes: Any) -> dict[str, Any]:
    config = TrainConfig(model="models/llama", data="data/<b>.jsonl", output="out put", learning_rate=1e-5)
    return {
        "output": "out put",
        "steps": 40,
        "tokens": 12345,
        "train_loss": 2.5,
        "eval_loss": 2.25,
        "eval_loss_before": 3.0,
        "tokens_per_second": 1234.5,
        "peak_bytes": 2_500_000_000,
        "planned_bytes": None,
        "resumed_from": None,
        "epochs": 1.5,
        "examples": 100,
        "eval_examples": 5,
        "dropped_records": 2,
        "max_length": 512,
        "trainable_parameters": 10,
        "parameters": 1000,
        "training_seconds": 100.0,
        "finished_at": "2026-01-02T03:04:05+00:00",
        "device": "a CPU",
        "seed": 0,
        "versions": {"fourbit": "1.2.3", "torch": "9.9"},
        "history": "history.jsonl",
        "config": config.to_full_dict(),
    } | changes


def history(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 3 - step / steps,
            "learning_rate": 1e-5,
            "tokens": 300 * step,
            "seconds": 2.0 * step,
            "memory_bytes": 1e9,
            "peak_bytes": 2e9,
        }
        for step in range(1, steps + 1)
    ]
    return [*rows, {"step": steps, "eval_loss": 2.25}]


SAMPLES = [Sample([1, 2], "What is <i>4 & 4</i>?", "Eight.", "Four four.", "")]


def test_everything_is_in_it() -> None:
    page = write_report(metrics(), history(40), SAMPLES, ["Recognised Alpaca records."])
    for part in (
        "llama",
        "2.250",
        "from 3.000",
        "1,234",
        "2.5 GB",
        "1.00%",
        "1 min 40 s",
        "What is &lt;i&gt;4 &amp; 4&lt;/i&gt;?",
        "Eight.",
        "Four four.",
        "Recognised Alpaca records.",
        "learning_rate",
        "9.9",
        "fourbit chat models/llama --adapter &#39;out put&#39;",
    ):
        assert part in page, part
    assert "<b>.jsonl" not in page
    assert page.count("<svg") == 4


def test_commands_load_the_model_as_it_was_trained() -> None:
    config = TrainConfig(
        model="m", data="d", output="o", format="fp4", block_size=128, double_quant=False, revision="v1"
    ).to_full_dict()
    expected = "m --adapter o --format fp4 --block-size 128 --revision v1 --no-double-quant"
    assert model_arguments(config) == expected
    assert f"fourbit chat {expected}<" in write_report(metrics(config=config), history(2), [], [])


def test_training_longer_is_twice_as_long() -> None:
    assert "--resume num_train_epochs=6<" in write_report(metrics(), history(2), [], [])
    config = metrics()["config"] | {"max_steps": 70}
    assert "--resume max_steps=140<" in write_report(metrics(config=config), history(2), [], [])


def test_it_needs_nothing_from_elsewhere() -> None:
    page = write_report(metrics(), history(40), SAMPLES, [])
    assert not re.findall(r"""(?:src|href|url)\s*[=(]""", page)
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_runs_of_any_length(steps: int) -> None:
    bare = metrics(eval_loss=None, eval_loss_before=None, tokens_per_second=None, eval_examples=0, resumed_from=7)
    page = write_report(bare, history(steps)[:-1], [], [])
    assert "training loss" in page
    assert "resumed after step 7" in page
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(picture)


def test_a_chart_holds_its_points_within_its_frame() -> None:
    points = [(step, math.sin(step)) for step in range(5000)]
    picture = ElementTree.fromstring(draw([Series("wave", points)], title="wave", width=500, height=200))
    path = next(part for part in picture if part.get("class") == "line main").get("d", "")
    places = [tuple(map(float, place.split())) for place in path[1:].split("L")]
    assert 500 < len(places) <= 1201
    assert all(0 <= x <= 500 and 0 <= y <= 200 for x, y in places)
    assert places[0][0] < 80
    assert places[-1][0] > 480


def test_a_chart_of_one_value_that_never_changes() -> None:
    picture = ElementTree.fromstring(draw([Series("flat", [(1, 5.0), (2, 5.0)])], title="flat"))
    assert [part.text for part in picture if part.tag == "text"]
    assert draw([Series("none", [])], title="none") == ""


def test_smoothing_is_not_pulled_towards_the_start() -> None:
    assert smooth([(1, 4.0), (2, 4.0)], weight=0.9) == [(1, pytest.approx(4.0)), (2, pytest.approx(4.0))]
    assert smooth([(1, 0.0), (2, 1.0)], weight=0.5)[-1] == (2, pytest.approx(2 / 3))
