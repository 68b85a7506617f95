"""The demo from end to end on a base that knows nothing: every part runs, and everything lies where it is said to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fourbit.demo.story import Chapter, Event, Examining, Training, outline, read_world, run_demo, training_config
from fourbit.demo.world import make_world
from fourbit.errors import BrokenCheckpoint, InputError, OutputExists

# peft 0.21 asks transformers 5.23 by the old name, and `adapters.attach` hands the warning on
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_the_whole_story(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    events: list[Event] = []
    result = run_demo(output, model=tiny_base, questions=24, on_event=events.append, max_steps=4)
    kinds = [type(event) for event in events]
    assert kinds.count(Chapter) >= 5
    assert Examining in kinds
    assert Training in kinds
    assert 0 <= result.exact_match_before <= result.exact_match_after <= 1
    assert result.bytes_4bit < result.bytes_16bit
    assert Path(result.report).is_file()
    assert {path.name for path in output.iterdir()} == {
        "base-nf4", "data", "demo.json", "fourbit.json", "lora-16bit", "qlora",
    }  # fmt: skip
    written = json.loads((output / "demo.json").read_text())
    assert written["exact_match_16bit"] == result.exact_match_16bit
    assert len(result.dialogues) == 5
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    for name in ("qlora", "lora-16bit"):  # the adapters are peft's
        PeftModel.from_pretrained(base, output / name)
        base = AutoModelForCausalLM.from_pretrained(tiny_base)


def test_an_earlier_demo_is_replaced_and_nothing_else(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    output.mkdir()
    (output / "letter.txt").write_text("mine")
    with pytest.raises(OutputExists, match="did not write"):
        run_demo(output, model=tiny_base)
    assert [path.name for path in output.iterdir()] == ["letter.txt"]


def test_the_outline_says_what_will_be_done(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = outline(model=tiny_base, questions=8)
    weights = AutoModelForCausalLM.from_pretrained(tiny_base).parameters()
    assert plan.parameters == sum(weight.numel() for weight in weights)
    assert plan.questions == 10
    assert plan.bytes_4bit < plan.bytes_16bit
    assert list(tmp_path.iterdir()) == []


def test_the_world_is_the_one_the_base_was_pretrained_on(tiny_base: Path, tmp_path: Path) -> None:
    assert read_world(tiny_base) == make_world(0, people=12)
    with pytest.raises(InputError, match="no base model of the demo"):
        read_world(tmp_path)
    (tmp_path / "pretraining.json").write_text("{}")
    with pytest.raises(BrokenCheckpoint, match="which world"):
        read_world(tmp_path)


def test_a_setting_can_be_changed() -> None:
    config = training_config(Path("m"), Path("d"), Path("o"), lora_r=4)
    assert (config.lora_r, config.model, config.output) == (4, "m", "o")
