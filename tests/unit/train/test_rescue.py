"""A step that runs out of memory at any place ends with the gradients, loss and random numbers of one that did not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit.errors import InputError
from fourbit.models.out_of_memory import MemoryLimitReached
from fourbit.train import TrainConfig
from fourbit.train import rescue as rescue_module
from fourbit.train.events import Event
from fourbit.train.guarded import GuardedTrainer
from fourbit.train.interrupt import Stop
from fourbit.train.material import open_material
from fourbit.train.model import load_trainable
from fourbit.train.pieces import Piece
from fourbit.train.trainer import FourbitTrainer
from fourbit.train.watch import MemoryWatch, resident_bytes

MakeConfig = Callable[..., TrainConfig]

INJECTED = "injected: out of memory"


class OutOfMemoryAt(TorchDispatchMode):
    """Raises at chosen operations and allocations of a block, counted from 1, those inside of our kernels included.

    A dispatch mode sees every operation of torch, forward and backward, and ours as one each. What they allocate in
    Python is counted by functions in the place of torch's.
    """

    def __init__(self, *places: int) -> None:
        super().__init__()
        self.places, self.count = places, 0

    def tick(self) -> None:
        self.count += 1
        if self.count in self.places:
            raise torch.OutOfMemoryError(f"{INJECTED} at {self.count}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tick()
        return function(*args, **(kwargs or {}))


@contextmanager
def out_of_memory_at(monkeypatch: pytest.MonkeyPatch, *places: int) -> Iterator[OutOfMemoryAt]:
    mode = OutOfMemoryAt(*places)
    with monkeypatch.context() as patch, mode:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            own = getattr(owner, name)

            def counted(*args: Any, own: Any = own, **kwargs: Any) -> Any:
                mode.tick()
                return own(*args, **kwargs)

            patch.setattr(owner, name, counted)
        yield mode


class Outcome(NamedTuple):
    """Of a step.

    Attributes:
        operations: how many there were, those of failed attempts included.
    """

    gradients: dict[str, Tensor]
    loss: float
    random_state: Tensor
    operations: int


class Step:
    """One step of a run: two batches, of which the second is disturbed."""

    def __init__(self, config: TrainConfig) -> None:
        self.events: list[Event] = []
        material = open_material(config, on_event=self.events.append)
        self.model = load_trainable(config)
        self.trainer = FourbitTrainer(
            self.model,
            config=config,
            tokenizer=material.tokenizer,
            train_data=material.rows,
            eval_data=material.eval_rows,
            stop=Stop(),
            on_event=self.events.append,
        )
        with torch.no_grad():  # or B is 0 and A has no gradient
            generator = torch.Generator().manual_seed(1)
            for parameter in self.parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        batches = iter(self.trainer.get_train_dataloader())
        self.batches = [next(batches), next(batches)]
        self.labelled = sum((batch["labels"][..., 1:] != -100).sum() for batch in self.batches)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def work(self, piece: Mapping[str, Any]) -> Tensor:
        """What the trainer does with a batch."""
        return super(GuardedTrainer, self.trainer).training_step(self.model, piece, self.labelled)

    def run(self, monkeypatch: pytest.MonkeyPatch, *places: int, most: int | None = None) -> Outcome:
        """The step, whose second batch runs out of memory at some places."""
        self.model.zero_grad()
        rescue = self.trainer.rescue
        rescue.most = most
        torch.manual_seed(3)
        with rescue.attached():
            rescue.train(self.batches[0], self.work)
            with out_of_memory_at(monkeypatch, *places) as mode:
                loss = rescue.train(self.batches[1], self.work)
        assert all(each.requires_grad for each in self.parameters.values())
        gradients = {name: each.grad.clone() for name, each in self.parameters.items() if each.grad is not None}
        assert gradients.keys() == self.parameters.keys()
        return Outcome(gradients, float(loss), torch.get_rng_state(), mode.count)


def largest_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((found[name] - each).norm() / each.norm()) for name, each in expected.items())


TOLERANCE = 3e-5
"""Of a gradient's norm. In pieces the same terms are added in another order: up to 384 tokens, or 320 products where a
GEMM of another shape cuts its sums differently. Each such sum in fp32 is off by some sqrt(384) 2^-24 = 1.2e-6, and a
gradient has 28 products of a model of two layers on its way."""

VARIANTS: dict[str, dict[str, Any]] = {
    "rows": {},
    "kept activations": {"gradient_checkpointing": False},
    "packed": {"packing": True},
    "16 bits": {"format": "none", "gradient_checkpointing": False},  # peft's own layer, and torch's dropout in it
    "16 bits, packed": {"format": "none", "packing": True},
}


@pytest.fixture(params=VARIANTS)
def step(request: pytest.FixtureRequest, make_config: MakeConfig) -> Iterator[Step]:
    settings = {"dtype": "float32", "per_device_train_batch_size": 4, "lora_dropout": 0.3, "max_length": 96}
    made = Step(make_config(**settings | VARIANTS[request.param]))
    gc.collect()
    gc.freeze()  # or collecting in each rescue takes longer than the step
    yield made
    gc.unfreeze()


def check(step: Step, monkeypatch: pytest.MonkeyPatch, whole: Outcome, *places: int) -> None:
    found = step.run(monkeypatch, *places)
    assert step.trainer.rescue.most is not None, places
    assert largest_error(found.gradients, whole.gradients) < TOLERANCE, places
    assert found.loss == pytest.approx(whole.loss, rel=1e-6), places
    assert torch.equal(found.random_state, whole.random_state), places


def test_a_step_may_run_out_of_memory_anywhere(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five places, then twice: in its backward pass and in that of its first half, or of its second."""
    whole = step.run(monkeypatch)
    assert step.trainer.rescue.most is None
    n = whole.operations
    for place in (1, int(0.3 * n), int(0.6 * n), int(0.9 * n), n):
        check(step, monkeypatch, whole, place)
    check(step, monkeypatch, whole, int(0.8 * n), int(1.7 * n))
    check(step, monkeypatch, whole, int(0.6 * n), int(2.2 * n))


@pytest.mark.slow
def test_a_step_may_run_out_of_memory_at_every_operation(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step.run(monkeypatch)
    for place in range(1, whole.operations + 1):
        check(step, monkeypatch, whole, place)


def test_the_comparison_sees_what_can_go_wrong(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks drawn anew, finished gradients counted twice, gradients of the failed attempt lost: each shows."""
    step = Step(make_config(dtype="float32", per_device_train_batch_size=4, lora_dropout=0.3))
    whole = step.run(monkeypatch)
    late = int(0.8 * whole.operations)
    with monkeypatch.context() as patch:
        patch.setattr(rescue_module, "cut_masks", lambda part: nullcontext())
        assert largest_error(step.run(monkeypatch, late).gradients, whole.gradients) > 100 * TOLERANCE
    with monkeypatch.context() as patch:
        patch.setattr(rescue_module, "_without_gradients", lambda parameters: nullcontext())
        assert largest_error(step.run(monkeypatch, late).gradients, whole.gradients) > 100 * TOLERANCE
    check(step, monkeypatch, whole, late)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_done_in_pieces_from_the_start(
    most: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(make_config(dtype="float32", per_device_train_batch_size=4, lora_dropout=0.3))
    whole, found = step.run(monkeypatch), step.run(monkeypatch, most=most)
    assert largest_error(found.gradients, whole.gradients) < TOLERANCE
    assert torch.equal(found.random_state, whole.random_state)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_checkpointing_is_turned_on_when_one_row_does_not_fit(
    share: float, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(
        make_config(dtype="float32", per_device_train_batch_size=1, gradient_checkpointing=False, lora_dropout=0.3)
    )
    whole = step.run(monkeypatch)
    found = step.run(monkeypatch, int(share * whole.operations))
    assert step.trainer.rescue.checkpointing
    assert found.operations > whole.operations * (1.2 + share)  # that part, and all of it with the forward pass twice
    assert largest_error(found.gradients, whole.gradients) < TOLERANCE
    assert torch.equal(found.random_state, whole.random_state)
    with pytest.raises(InputError, match=r"One row of 48 tokens alone does not fit into memory even with gradient"):
        step.run(monkeypatch, 10)


def test_other_errors_are_not_taken_for_a_lack_of_memory(make_config: MakeConfig) -> None:
    step = Step(make_config(dtype="float32"))

    def work(piece: Mapping[str, Any]) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(RuntimeError, match="shared memory"):
        step.trainer.rescue.train(step.batches[0], work)


# Pieces


def test_a_packed_batch_is_cut_between_examples() -> None:
    positions = [*range(5), *range(3), *range(9), *range(2), 0, 0, 0, 0, 0]
    tokens = torch.arange(len(positions))[None]
    batch = {"input_ids": tokens, "labels": tokens.clone(), "position_ids": torch.tensor([positions])}
    batch["cu_seq_lens_q"] = torch.tensor([0, 5, 8, 17, 19, 20, 21, 22, 23, 24], dtype=torch.int32)
    pieces = Piece.of_batch(batch, packed=True).cut(8, multiple=4)
    assert [piece.part for piece in pieces] == [(0, 8, 24), (8, 12, 24), (17, 7, 24)]
    assert [piece.used for piece in pieces] == [8, 9, 7]
    assert pieces[1].inputs["position_ids"].tolist() == [[*range(9), 0, 1, 0]]
    assert pieces[1].inputs["labels"].tolist() == [[*range(8, 17), -100, -100, -100]]  # the rest is the next piece's
    assert pieces[1].inputs["cu_seq_lens_q"].tolist() == [0, 9, 11, 12]
    assert [len(piece.cut(4, multiple=4)) for piece in pieces] == [2, 1, 1]  # one example is never cut
    nested = pieces[0].cut(5, multiple=4)
    assert [piece.part for piece in nested] == [(0, 8, 24), (5, 3, 24)]
    labels = [label for piece in (*nested, *pieces[1:]) for label in piece.inputs["labels"][0].tolist() if label >= 0]
    assert labels == tokens[0].tolist()  # each once


def test_rows_are_cut_with_everything_that_belongs_to_them() -> None:
    batch = {"input_ids": torch.arange(20).view(5, 4), "labels": torch.arange(20).view(5, 4), "note": 3}
    pieces = Piece.of_batch(batch, packed=False).cut(2)
    assert [piece.part for piece in pieces] == [(0, 8, 20), (8, 8, 20), (16, 4, 20)]
    assert torch.equal(torch.cat([piece.inputs["labels"] for piece in pieces]), batch["labels"])
    assert all(piece.inputs["note"] == 3 for piece in pieces)


# A limit on a CPU


def test_the_watch_raises_before_the_limit_is_passed() -> None:
    """It grows by 10 at a time, so at 85 the next look could find 95, and one later 105: too late."""
    held = iter([50, 60, 70, 80, 90])
    watch = MemoryWatch(95, measure=lambda: next(held))
    watch.begin()
    watch.look()
    watch.look()
    watch.look()
    with pytest.raises(MemoryLimitReached, match=r"holds 90 bytes, and `memory` allows 95 bytes"):
        watch.look()


def test_a_limit_is_kept_by_doing_less_at_a_time(make_config: MakeConfig) -> None:
    """The size is made up: what a row takes, at each look, up to the end of the batch."""
    step = Step(make_config(dtype="float32", per_device_train_batch_size=4, lora_dropout=0.0, memory="1000"))
    rescue, rows, looks = step.trainer.rescue, [0], [0]

    def measure() -> int:
        looks[0] += 1
        return rows[0] * 10 * looks[0]

    rescue._watch = MemoryWatch(1000, measure=measure)

    def work(piece: Mapping[str, Any]) -> Tensor:
        rows[0], looks[0] = len(piece["input_ids"]), 0
        return step.work(piece)

    with rescue.attached():
        rescue.train(step.batches[0], work)
    assert rescue.most == 1
    assert not any(module._forward_pre_hooks for module in step.model.modules())


def test_the_resident_size_is_the_systems() -> None:
    import psutil

    before = resident_bytes()
    kept = torch.ones(1 << 24)
    grown = resident_bytes() - before
    assert abs(resident_bytes() - psutil.Process().memory_info().rss) < 4 << 20
    assert grown >= 0.9 * kept.nbytes
