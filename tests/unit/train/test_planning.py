"""A run is planned first: refused where it cannot fit, tried before it starts, and reported beside what it took."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourbit.errors import InputError
from fourbit.memory.plan import PARTS
from fourbit.train import TrainConfig, planning, train
from fourbit.train.events import Said

Make = Callable[..., TrainConfig]


def test_knobs_are_those_of_the_run(make_config: Make) -> None:
    knobs = planning.knobs_of(make_config(lora_dropout=0.05, gradient_checkpointing=False), length=33)
    assert (knobs.batch_size, knobs.accumulation, knobs.rank, knobs.dropout) == (2, 2, 8, 0.05)
    assert knobs.sequence_length == 40  # padded to a multiple of 8, as 64 tokens are allowed
    assert knobs.checkpointing is False
    assert knobs.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert planning.knobs_of(make_config(), device="cuda").device == "cuda"
    assert planning.knobs_of(make_config(activation_offloading=True)).checkpointing == "offload"
    assert planning.knobs_of(make_config(target_modules="q_proj, v_proj")).target_modules == ["q_proj", "v_proj"] or (
        planning.knobs_of(make_config(target_modules="q_proj, v_proj")).target_modules == ("q_proj", "v_proj")
    )


def test_memory_is_a_size(make_config: Make) -> None:
    assert make_config(memory="24GB").memory_bytes == 24 * 10**9
    assert make_config(memory="24 GiB").memory_bytes == 24 << 30
    for wrong in ("24XB", "-1GB", "lots"):
        with pytest.raises(InputError, match="`memory`"):
            make_config(memory=wrong)
    assert planning.machine_bytes(make_config(memory="1MB")) == 10**6
    there = planning.machine_bytes(make_config())
    assert there is None or there > 10**8


def test_what_cannot_fit_is_refused_before_anything_is_written(make_config: Make) -> None:
    config = make_config(memory="100MB")
    with pytest.raises(InputError, match=r"This run needs .* and there are 100 MB: no setting makes it fit"):
        train(config)
    assert not (planning.Path(config.output) / "config.yaml").exists()


def test_the_cheapest_change_is_named(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(per_device_train_batch_size=8, max_length=64, memory="4GB")
    rows = SimpleNamespace(rows={"input_ids": [[0] * 64]}, max_length=64)
    needed = planning.plan_run(config, rows)  # type: ignore[arg-type]
    assert needed.plan is not None
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "baseline_bytes", lambda: 0, raising=False)
    limit = needed.plan.total_bytes - needed.plan.parts["process"] + planning.WORKING_BYTES
    monkeypatch.setattr(planning, "_of_this_process", lambda plan: _with_process(plan, planning.WORKING_BYTES))
    monkeypatch.setattr(planning, "machine_bytes", lambda config: limit - 200_000)
    with pytest.raises(InputError, match=r"add `per_device_train_batch_size=4 gradient_accumulation_steps=4`, which"):
        planning.plan_run(config, rows)  # type: ignore[arg-type]
    assert planning.plan_run(config.with_(force=True), rows).plan is not None  # type: ignore[arg-type]


def _with_process(plan: Any, size_bytes: int) -> Any:
    from dataclasses import replace

    return replace(plan, parts={**plan.parts, "process": size_bytes})


def test_a_run_says_and_records_its_plan(make_config: Make) -> None:
    said: list[str] = []
    result = train(make_config(max_steps=2), on_event=lambda event: said.append(getattr(event, "sentence", "")))
    assert any(sentence.startswith("Planned peak memory: ") for sentence in said)
    metrics = result.metrics
    assert result.planned_bytes == metrics["planned_bytes"] == sum(metrics["planned_parts"].values())
    assert list(metrics["planned_parts"]) == list(PARTS)
    measured = metrics["measured_parts"]
    for part in ("weights_4bit", "scales", "adapters"):
        assert measured[part] == metrics["planned_parts"][part]
    # Two moments in fp32 for each parameter, and a step count for each tensor.
    assert 0 <= measured["optimizer"] - metrics["planned_parts"]["optimizer"] < 4 * 2 * 7 * 2 * 2
    assert "Memory at the peak" in (result.output / "report.html").read_text()


def test_the_probe_leaves_nothing_behind(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout on: a random number that the probe drew would change the adapter."""
    probed: list[str | None] = []
    own = planning.probe

    def watched(trainer: Any, material: Any) -> str | None:
        before = torch.get_rng_state()
        probed.append(own(trainer, material))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        return probed[-1]

    monkeypatch.setattr(planning, "probe", watched)
    with_probe = train(make_config(max_steps=3, lora_dropout=0.3))
    monkeypatch.setattr(planning, "probe", lambda trainer, material: None)
    without = train(make_config(max_steps=3, lora_dropout=0.3), overwrite=True)
    assert probed == [None]
    assert with_probe.train_loss == without.train_loss
    ours, theirs = (dict(result.model.named_parameters()) for result in (with_probe, without))  # type: ignore[union-attr]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_longest_batch_that_does_not_fit_is_said(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourbit.train.trainer import FourbitTrainer

    own, said = FourbitTrainer.compute_loss, []
    calls = iter([True])

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(FourbitTrainer, "compute_loss", failing)
    result = train(make_config(max_steps=1), on_event=said.append)
    assert result.steps == 1
    assert any(isinstance(event, Said) and "The longest batch (2 × " in event.sentence for event in said)


def test_a_model_that_cannot_be_rehearsed_is_trained_without_a_plan(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise InputError("A step of a Thing cannot be planned: it loops.")

    monkeypatch.setattr("fourbit.memory.plan.Planner.plan", refuse)
    result = train(make_config(max_steps=1))
    assert result.planned_bytes is None
    assert result.metrics["planned_parts"] is None
