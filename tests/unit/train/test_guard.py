"""Steps without numbers change nothing and end the run in time; a divergence is flagged once, and noise never."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fourbit.errors import InputError
from fourbit.train import TrainConfig, train
from fourbit.train.events import Event, Noted, Stepped
from fourbit.train.guard import FEWEST, IN_A_ROW, Guard, name_places
from fourbit.train.material import open_material
from fourbit.train.trainer import FourbitTrainer

MakeConfig = Callable[..., TrainConfig]
Steps = dict[int, float]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, list[list[int]]]]:
    """Give some steps a factor on their loss, in their last batch; returns the token ids that each step saw."""

    def begin(factors: Steps) -> dict[int, list[list[int]]]:
        compute, seen = FourbitTrainer.compute_loss, {}

        def poisoned(self: FourbitTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            step = self.state.global_step + 1
            rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True) if "attention_mask" in inputs else ()
            seen.setdefault(step, []).extend(ids[mask.bool()].tolist() for ids, mask in rows)
            loss = compute(self, model, inputs, *args, **kwargs)
            return loss * (factors.get(step, 1.0) if self.accelerator.sync_gradients else 1.0)

        monkeypatch.setattr(FourbitTrainer, "compute_loss", poisoned)
        return seen

    return begin


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def places(sentence: str) -> set[int]:
    """The lines that a sentence names."""
    return {int(number) for number in sentence.partition("sums.jsonl, line ")[2].split(".")[0].split(", ")}


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_step_changes_nothing_but_counts(
    factor: float, make_config: MakeConfig, poison: Any, tmp_path: Path
) -> None:
    config = make_config(save_steps=1, save_total_limit=None, report_to="none")
    seen = poison({3: factor})
    events: list[Event] = []
    result = train(config, on_event=events.append)
    before, after, next_one = (tmp_path / "out" / f"checkpoint-{step}" for step in (2, 3, 4))
    assert adapter(after) == adapter(before) != adapter(next_one)
    optimizer = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (before, after)]
    assert all(
        torch.equal(value, optimizer[1][index][name])
        for index, state in optimizer[0].items()
        for name, value in state.items()
    )
    assert (result.steps, result.finished) == (6, True)
    noted = [event for event in events if isinstance(event, Noted)]
    assert [(event.step, event.kind) for event in noted] == [(3, "skipped")]
    assert f"its loss is {'nan' if math.isnan(factor) else 'inf'}" in noted[0].sentence
    rows = history(tmp_path / "out")
    assert [row["sentence"] for row in rows if "event" in row] == [noted[0].sentence]
    assert noted[0].sentence in (tmp_path / "out" / "report.html").read_text().replace("&#39;", "'")
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 4, 5, 6]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 5
    assert result.train_loss == pytest.approx(sum(losses) / 5)
    # The records that are named are those that the step was given.
    material = open_material(config, on_event=lambda event: None)
    named = [
        row["input_ids"] for row in material.train if int(row["place"].rpartition(" ")[2]) in places(noted[0].sentence)
    ]
    assert sorted(named) == sorted(seen[3])


def test_a_bad_gradient_is_seen_where_the_loss_is_fine(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    norm = FourbitTrainer._clip_grad_norm

    def spoiled(self: FourbitTrainer, model: Any) -> Any:
        if self.state.global_step == 2:
            next(each for each in model.parameters() if each.grad is not None).grad.view(-1)[0] = math.inf
        return norm(self, model)

    monkeypatch.setattr(FourbitTrainer, "_clip_grad_norm", spoiled)
    train(make_config(save_steps=1, save_total_limit=None))
    assert adapter(tmp_path / "out" / "checkpoint-3") == adapter(tmp_path / "out" / "checkpoint-2")
    assert (
        "the norm of its gradients is inf"
        in next(row for row in history(tmp_path / "out") if "event" in row)["sentence"]
    )


def test_without_clipping_a_bad_step_is_left_out_as_well(make_config: MakeConfig, poison: Any, tmp_path: Path) -> None:
    poison({3: math.nan})
    train(make_config(save_steps=1, save_total_limit=None, max_grad_norm=0))
    assert adapter(tmp_path / "out" / "checkpoint-3") == adapter(tmp_path / "out" / "checkpoint-2")


def test_the_mean_of_several_steps_leaves_the_bad_ones_out(make_config: MakeConfig, poison: Any) -> None:
    def losses(**changes: Any) -> list[float]:
        events: list[Event] = []
        train(make_config(**changes), on_event=events.append, overwrite=True)
        return [event.loss for event in events if isinstance(event, Stepped)]

    poison({2: math.nan})
    each = losses()
    assert losses(logging_steps=3) == pytest.approx([(each[0] + each[1]) / 2, sum(each[2:]) / 3])


def test_too_many_in_a_row_end_the_run_with_a_good_checkpoint(
    make_config: MakeConfig, poison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad records, as their factor is theirs and not the weights'."""
    bad = {3: math.nan, 5: math.nan, 6: math.nan, 7: math.nan}  # 4 is good in between, and the count begins anew
    poison(bad)
    config = make_config(max_steps=10, max_skipped_steps=3, save_steps=100)
    with pytest.raises(InputError) as caught:
        train(config)
    sentence = str(caught.value)
    assert sentence.startswith("3 steps in a row gave no numbers and changed nothing, the last of them step 7:")
    assert "Look at these records" in sentence
    assert sentence.endswith("checkpoint-7 remains, and --resume goes on from it.")
    assert len(places(sentence)) == 4
    bad.clear()  # somebody has mended it
    result = train(config, resume=True)
    assert (result.finished, result.steps, result.resumed_from) == (True, 10, 7)


def test_ruined_weights_are_not_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(learning_rate=1e30, max_steps=8, save_steps=100, max_grad_norm=0, warmup_steps=0)
    with pytest.raises(InputError, match=r"Good records give none either now; lower `learning_rate` \(1e\+30\)\.$"):
        train(config)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_run_with_bad_steps_resumes_bit_for_bit(
    config_for: Callable[..., TrainConfig], poison: Any, tmp_path: Path
) -> None:
    poison({2: math.nan, 5: math.inf})
    whole, parts = config_for(tmp_path / "whole"), config_for(tmp_path / "parts", save_steps=2)
    train(whole)
    train(parts.with_(max_steps=4))
    train(parts, resume=True)
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "parts")
    events = [[row for row in history(folder) if "event" in row] for folder in (tmp_path / "whole", tmp_path / "parts")]
    assert events[0] == events[1]
    assert [row["step"] for row in events[0]] == [2, 5]


def test_records_of_packed_rows_are_named(make_config: MakeConfig, poison: Any, tmp_path: Path) -> None:
    poison({1: math.nan})
    config = make_config(packing=True, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    events: list[Event] = []
    train(config, on_event=events.append)
    sentence = next(event.sentence for event in events if isinstance(event, Noted))
    material = open_material(config, on_event=lambda event: None)
    numbers = places(sentence)
    named = (row["input_ids"] for row in material.train if int(row["place"].split()[-1]) in numbers)
    found = [token for ids in named for token in ids]
    assert any(sorted(found) == sorted(row["input_ids"]) for row in material.rows)  # one row holds just these


# Overflow in float16


def test_the_scaler_may_look_for_its_factor() -> None:
    guard = Guard(2)
    for scale in (65536.0, 32768.0, 16384.0, 8192.0):
        assert guard.judge(1, 2.0, math.inf, scale=scale) is None
    assert guard.judge(1, math.nan, math.nan, scale=8192.0) == "its loss is nan"  # that is no matter of scale
    assert guard.judge(2, 2.0, math.nan, scale=1.0) == "the norm of its gradients is nan"
    assert guard.is_over
    assert guard.skipped == 2


# Divergence


def noisy(seed: int, steps: int, tail: float) -> list[float]:
    """Losses of small batches: falling, with heavy-tailed noise."""
    draw = random.Random(seed)
    return [2 + 3 * math.exp(-step / 200) + 0.3 * math.exp(tail * draw.gauss(0, 1)) for step in range(steps)]


@pytest.mark.parametrize("tail", [0.1, 0.5, 1.0])
def test_noise_is_no_divergence(tail: float) -> None:
    for seed in range(10):
        guard = Guard(5)
        assert [loss for loss in noisy(seed, 3000, tail) if guard.watch(loss)] == []


def test_the_first_steps_are_never_flagged() -> None:
    guard = Guard(5)
    assert not any(guard.watch(10.0**step) for step in range(FEWEST + IN_A_ROW - 1))


@pytest.mark.parametrize("tail", [0.1, 0.5])
def test_a_divergence_is_flagged_once_and_soon(tail: float) -> None:
    guard = Guard(5)
    losses = noisy(0, 300, tail) + [8 + 0.1 * step for step in range(300)]
    flagged = [step for step, loss in enumerate(losses) if guard.watch(loss)]
    assert flagged == [300 + IN_A_ROW - 1]


def test_one_bad_batch_is_no_divergence() -> None:
    guard = Guard(5)
    losses = noisy(0, 100, 0.1)
    losses[50] = losses[60] = losses[61] = losses[62] = 1e6
    assert not any(map(guard.watch, losses))


def test_a_diverging_run_says_so(make_config: MakeConfig, poison: Any, tmp_path: Path) -> None:
    poison(dict.fromkeys(range(24, 40), 50.0))
    events: list[Event] = []
    train(make_config(max_steps=30, learning_rate=1e-5), on_event=events.append)
    noted = [event for event in events if isinstance(event, Noted)]
    assert [(event.step, event.kind) for event in noted] == [(28, "diverged")]
    assert "a lower `learning_rate`" in noted[0].sentence


def test_its_state_outlives_the_process(tmp_path: Path) -> None:
    first, again = Guard(5), Guard(5)
    losses = noisy(1, 40, 0.5)
    for step, loss in enumerate(losses[:30]):
        first.watch(loss)
        first.judge(step, math.nan if step % 3 else loss, 1.0, scale=None)
    first.save(tmp_path / "guard.json")
    again.load(tmp_path / "guard.json")
    assert vars(first) == vars(again)


def test_places_are_named_in_few_words() -> None:
    found = name_places(["a b.jsonl, line 3", "a b.jsonl, line 9", "c.json, record 1", "a b.jsonl, line 3"])
    assert found == "a b.jsonl, line 3, 9; c.json, record 1"
    assert name_places([f"a.jsonl, line {number}" for number in range(30)]).endswith("22, 23 and 6 more")
