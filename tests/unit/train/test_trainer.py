"""The numbers of a training step, against loops written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fourbit
from fourbit.train import TrainConfig, train
from fourbit.train.events import Event, Stepped
from fourbit.train.material import Material, open_material
from fourbit.train.model import load_trainable
from fourbit.train.order import EpochSampler
from fourbit.train.trainer import scoring

MakeConfig = Callable[..., TrainConfig]


def ignore(event: Event) -> None:
    """Nobody listens."""


def run(config: TrainConfig) -> tuple[list[float], float | None]:
    """The losses of all steps, and the last one of the evaluation."""
    events: list[Event] = []
    result = train(config, overwrite=True, on_event=events.append)
    return [event.loss for event in events if isinstance(event, Stepped)], result.eval_loss


def plain_model(config: TrainConfig) -> Any:
    """What the run trains, without `fourbit.prepare`: transformers' own logits, loss and attention."""
    model = fourbit.load(config.model, dtype=torch.float32)
    torch.manual_seed(config.seed)
    settings = LoraConfig(r=config.lora_r, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model.requires_grad_(False), settings).train()


def summed_loss(model: Any, row: dict[str, list[int]]) -> tuple[torch.Tensor, int]:
    """The sum of the losses of one example alone, and of how many tokens."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], ignore_index=-100, reduction="sum")
    return losses, int((labels[0, 1:] != -100).sum())


def by_hand(config: TrainConfig, material: Material) -> list[float]:
    """The losses of the run's steps: one example at a time, normalised by the labels of the step."""
    model = plain_model(config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    order = list(EpochSampler(lengths(material), group_size=size, seed=config.data_seed))
    found = []
    for step in range(config.max_steps):
        rows = [material.train[index] for index in order[step * size : (step + 1) * size]]
        losses, labels = zip(*(summed_loss(model, row) for row in rows), strict=True)
        loss = sum(losses) / sum(labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def lengths(material: Material) -> list[int]:
    return [len(ids) for ids in material.train["input_ids"]]


@pytest.fixture
def exact(make_config: MakeConfig) -> TrainConfig:
    """Without dropout and warm-up, in fp32, so that a loop of six lines does the same."""
    return make_config(dtype="float32", lora_dropout=0.0, warmup_steps=0)


def test_losses_are_those_of_a_loop_written_by_hand(exact: TrainConfig) -> None:
    losses, _ = run(exact)
    material = open_material(exact, on_event=ignore)
    # fp32 sums over up to 320 logits and 64 tokens in another order: some 1e-6 a step. The parameters drift apart by
    # it, and six steps of Adam at 1e-2, whose steps do not depend on the size of a gradient, make up to 100 times more.
    assert losses == pytest.approx(by_hand(exact, material), rel=1e-4)
    untrained = by_hand(exact.with_(learning_rate=1e-12), material)
    assert losses[1:] != pytest.approx(untrained[1:], rel=1e-2)  # the tolerance does see a training


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_cut_into_batches(exact: TrainConfig) -> None:
    whole, _ = run(exact.with_(per_device_train_batch_size=4, gradient_accumulation_steps=1))
    cut, _ = run(exact.with_(per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert whole == pytest.approx(cut, rel=1e-4)


def test_checkpointing_changes_no_loss(exact: TrainConfig) -> None:
    with_it, _ = run(exact)
    without, _ = run(exact.with_(gradient_checkpointing=False))
    assert with_it == without  # the same operations on the same numbers


def test_evaluation_is_the_mean_over_labelled_tokens(exact: TrainConfig) -> None:
    config = exact.with_(learning_rate=1e-12, max_steps=1, eval_size=10, per_device_eval_batch_size=4)
    _, found = run(config)
    model = plain_model(config).eval()
    data = open_material(config, on_event=ignore).evaluation
    assert data is not None
    with torch.no_grad():
        losses, labels = zip(*(summed_loss(model, row) for row in data), strict=True)
    assert len(set(labels)) > 1  # or a mean over examples would be the same
    assert found == pytest.approx(float(sum(losses)) / sum(labels), rel=1e-5)


def test_packed_and_unpacked_losses_agree(exact: TrainConfig) -> None:
    """Whatever is in a row, its examples are scored as if each were alone."""
    settings = {"learning_rate": 1e-12, "max_steps": 1, "eval_size": 12, "max_length": 96}
    _, alone = run(exact.with_(**settings))
    config = exact.with_(**settings, packing=True)
    _, packed = run(config)
    rows = open_material(config, on_event=ignore).eval_rows
    assert rows is not None
    assert len(rows) < 12
    assert packed == pytest.approx(alone, rel=1e-5)  # fp32, other shapes of the same products


def test_a_packed_step_trains_as_the_same_examples_unpacked(exact: TrainConfig) -> None:
    """All examples in one step: then packing changes their order in it, and nothing else."""
    settings = {"max_steps": 3, "max_length": 96, "eval_size": 0}
    alone, _ = run(exact.with_(**settings, per_device_train_batch_size=48, gradient_accumulation_steps=1))
    packed, _ = run(
        exact.with_(**settings, per_device_train_batch_size=1, gradient_accumulation_steps=48, packing=True)
    )
    assert packed == pytest.approx(alone, rel=1e-4)


def test_evaluating_more_often_changes_no_result(make_config: MakeConfig) -> None:
    seldom, _ = run(make_config(eval_steps=100, lora_dropout=0.2))
    often, _ = run(make_config(eval_steps=1, eval_on_start=True, lora_dropout=0.2))
    assert seldom == often


def test_evaluation_makes_no_logits_and_drops_nothing(make_config: MakeConfig) -> None:
    model = load_trainable(make_config(lora_dropout=0.9))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # or the adapter would add nothing that could be dropped
    model.train()
    ids = torch.arange(3, 40).view(1, -1)
    with scoring(model), torch.no_grad():
        one, other = (model(input_ids=ids, labels=ids) for _ in range(2))
    assert one.logits is None
    assert torch.equal(one.loss, other.loss)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(input_ids=ids, labels=ids).loss, one.loss)
