"""Whole runs in which the memory does not suffice: they go on, say so once, and are taken up as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fourbit.errors import InputError
from fourbit.train import TrainConfig, train
from fourbit.train.events import Event, Noted, Stepped
from fourbit.train.trainer import FourbitTrainer

MakeConfig = Callable[..., TrainConfig]
Limit = Callable[..., list[int]]


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Let training, or evaluation, run out of memory with more rows (or tokens of a packed row) than so many.

    Returns the sizes that were tried.
    """

    def limit(most: int, *, in_step: int = 1, evaluation: bool = False, packed: bool = False) -> list[int]:
        name, tried = "_score" if evaluation else "compute_loss", []
        own = getattr(FourbitTrainer, name)

        def limited(self: FourbitTrainer, *args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if evaluation else args[1]
            size = inputs["input_ids"].shape[1 if packed else 0]
            found = own(self, *args, **kwargs)
            if self.state.global_step + 1 >= in_step:
                tried.append(size)
                if size > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return found

        monkeypatch.setattr(FourbitTrainer, name, limited)
        return tried

    return limit


def run(config: TrainConfig, **how: Any) -> tuple[list[float], list[Noted], Any]:
    events: list[Event] = []
    result = train(config, on_event=events.append, **how)
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    return losses, [event for event in events if isinstance(event, Noted)], result


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_goes_on_with_the_same_losses(
    packing: bool, config_for: Callable[..., TrainConfig], room_for: Limit, tmp_path: Path
) -> None:
    """Dropout included. Six steps of Adam at 1e-2 make up to 100 times more of some 1e-6; see test_trainer."""
    settings = {"dtype": "float32", "lora_dropout": 0.2, "per_device_train_batch_size": 4, "packing": packing}
    expected, _, _ = run(config_for(tmp_path / "whole", **settings))
    tried = room_for(100 if packing else 1, in_step=2, packed=packing)
    found, noted, result = run(config_for(tmp_path / "rescued", **settings))
    assert found == pytest.approx(expected, rel=1e-4)
    assert (result.steps, result.finished) == (6, True)
    assert [(event.step, event.kind) for event in noted] == [(2, "out_of_memory")]
    assert "the effective batch is still 8 rows" in noted[0].sentence
    assert sum(size > (100 if packing else 1) for size in tried) == 2  # 4 and 2 rows, or 256 and 128 tokens, once each
    assert [row["sentence"] for row in rows(tmp_path / "rescued") if "event" in row] == [noted[0].sentence]
    assert noted[0].sentence in (tmp_path / "rescued" / "report.html").read_text()


def test_the_smaller_size_is_taken_up(config_for: Callable[..., TrainConfig], room_for: Limit, tmp_path: Path) -> None:
    tried = room_for(2)
    settings = {"per_device_train_batch_size": 4, "gradient_checkpointing": False}
    whole, parts = config_for(tmp_path / "whole", **settings), config_for(tmp_path / "parts", save_steps=3, **settings)
    run(whole)
    run(parts.with_(max_steps=3))
    tried.clear()
    _, noted, _ = run(parts, resume=True)
    assert set(tried) == {2}
    assert [event.step for event in noted] == []
    adapters = [
        (folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert adapters[0] == adapters[1]
    assert [row for row in rows(tmp_path / "whole") if "event" in row] == [
        row for row in rows(tmp_path / "parts") if "event" in row
    ]


def test_checkpointing_that_was_turned_on_stays_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What fits with checkpointing alone: the backward pass of one row."""
    backward = torch.Tensor.backward

    def limited(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        trainer = config_of.get("trainer")  # none while the run is planned and tried
        if trainer is not None and not trainer.model.get_base_model().is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward(self, *args, **kwargs)

    config_of: dict[str, FourbitTrainer] = {}
    own = FourbitTrainer.train
    monkeypatch.setattr(
        FourbitTrainer, "train", lambda self, **kwargs: (config_of.update(trainer=self), own(self, **kwargs))[1]
    )
    monkeypatch.setattr(torch.Tensor, "backward", limited)
    config = make_config(gradient_checkpointing=False, save_steps=3)
    _, noted, _ = run(config.with_(max_steps=3))
    assert len(noted) == 1
    assert "1 row at a time and with gradient checkpointing" in noted[0].sentence
    _, noted, result = run(config, resume=True)
    assert (noted, result.steps) == ([], 6)


def test_one_row_that_does_not_fit_ends_the_run_with_what_to_change(
    make_config: MakeConfig, room_for: Limit, tmp_path: Path
) -> None:
    room_for(0, in_step=3)
    with pytest.raises(InputError) as caught:
        run(make_config(save_steps=2))
    assert str(caught.value).startswith("One row of ")
    assert "lower `max_length` or `lora_r`" in str(caught.value)
    assert str(caught.value).endswith("checkpoint-2 remains, and --resume goes on from it.")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_optimizer_that_does_not_fit_says_so(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(InputError, match=r"Step 1 ran out of memory beside its batches.*smaller `lora_r`"):
        run(make_config())


def test_evaluation_is_done_in_pieces(make_config: MakeConfig, room_for: Limit) -> None:
    config = make_config(dtype="float32", max_steps=2, eval_steps=1, eval_size=10, per_device_eval_batch_size=8)
    _, _, expected = run(config)
    tried = room_for(3, evaluation=True)
    _, _, found = run(config, overwrite=True)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
    assert tried == [8, 4] + 10 * [2]  # 8 and 2 rows, twice; the larger sizes are tried once in a run


def test_an_evaluation_without_a_score_does_not_end_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    score = FourbitTrainer._score
    monkeypatch.setattr(FourbitTrainer, "_score", lambda self, inputs: score(self, inputs) * float("nan"))
    _, noted, result = run(make_config(eval_size=4, eval_steps=3))
    assert {event.kind for event in noted} == {"no_score"}
    assert result.finished
    assert result.eval_loss is None
    json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("memory", ["24 apples", "-1GB", "0"])
def test_a_limit_that_is_no_size(memory: str, make_config: MakeConfig) -> None:
    with pytest.raises(InputError, match="`memory` is"):
        make_config(memory=memory)
