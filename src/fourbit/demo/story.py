"""The demo: the whole way from a base model to one that answers, told as it happens.

It uses nothing that a user could not call: the base is quantized with `quantize_folder`, trained on with
`fourbit.train`, and asked through `fourbit.generate`, adapters read back from their files.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit import __version__
from fourbit.demo import MODEL_FOLDER
from fourbit.demo.chat import Question, clean_set, noisy_set
from fourbit.demo.exam import Exam, Score, examine, make_exam
from fourbit.demo.world import World, make_world
from fourbit.errors import BrokenCheckpoint, InputError
from fourbit.models.folders import MANIFEST_FILE, check_output

if TYPE_CHECKING:
    from fourbit.train import TrainConfig, TrainResult
    from fourbit.train.events import Event as TrainEvent

__all__ = [
    "Chapter",
    "DemoResult",
    "Event",
    "Examining",
    "Outline",
    "Training",
    "outline",
    "read_world",
    "run_demo",
    "training_config",
]

BASE, QLORA, LORA, DATA, RESULT = "base-nf4", "qlora", "lora-16bit", "data", "demo.json"
_SHOWN = 4
"""Held-out questions shown with their answers before and after."""


@dataclass(frozen=True)
class Chapter:
    """A part of the story begins or has something to say.

    Attributes:
        title: of the part; empty where it goes on.
        sentences: what there is to say.
    """

    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Examining:
    """Questions are being answered: `done` of `total`."""

    done: int
    total: int


@dataclass(frozen=True)
class Training:
    """Something that `fourbit.train` told."""

    event: TrainEvent


Event = Chapter | Examining | Training
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Outline:
    """What the demo will use, before anything is computed.

    Attributes:
        model: the folder of the base.
        parameters: of it.
        bytes_16bit, bytes_4bit: its weights in either form.
        examples: conversations to learn from.
        questions: of the exam, held-out facts and strangers together.
        steps: of the optimizer, for each of the two runs.
    """

    model: str
    parameters: int
    bytes_16bit: int
    bytes_4bit: int
    examples: int
    questions: int
    steps: int


@dataclass(frozen=True)
class DemoResult:
    """What came of it.

    Attributes:
        output: the folder with everything: data, 4-bit base, adapters, reports.
        exact_match_before, exact_match_after: the 4-bit model on held-out questions, from 0 to 1.
        exact_match_16bit: the same after 16-bit LoRA.
        admitted_before, admitted_after, admitted_16bit: how often it said that it does not know a person who does not
            exist.
        tokens_per_second, tokens_per_second_16bit: of training.
        peak_bytes: the most memory that this process held up to the end of the 4-bit training, or its GPU.
        bytes_16bit, bytes_4bit: the base's weights in either form.
        seconds: the whole demo.
        report: the page about the 4-bit run.
        dialogues: question, the base's answer, the finetuned one's.
    """

    output: str
    exact_match_before: float
    exact_match_after: float
    exact_match_16bit: float
    admitted_before: float
    admitted_after: float
    admitted_16bit: float
    tokens_per_second: float | None
    tokens_per_second_16bit: float | None
    peak_bytes: int
    bytes_16bit: int
    bytes_4bit: int
    seconds: float
    report: str
    dialogues: tuple[tuple[str, str, str], ...] = field(repr=False)


def training_config(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """How the demo finetunes; the base has a thousandth of a usual one's size, so the rate is higher and r lower.

    Args:
        model, data, output: as in `TrainConfig`.
        changes: other keys of it.
    """
    from fourbit.train import TrainConfig

    settings: dict[str, Any] = {
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "num_train_epochs": 6,
        "eval_size": 32,
        "save_steps": 10_000,  # it is over in a minute
        **changes,
    }
    return TrainConfig(model=str(model), data=str(data), output=str(output), **settings)


def outline(*, model: Path = MODEL_FOLDER, questions: int = 320) -> Outline:
    """What `run_demo` would do.

    Raises:
        InputError: there is no such model, or it is none that `fourbit.demo.pretrain` made.
    """
    from fourbit.models.streaming import quantize_folder
    from fourbit.quant import QuantConfig

    world = read_world(model)
    plan = quantize_folder(model, Path(BASE), QuantConfig(), overwrite=False, dry_run=True)
    config = training_config(model, Path(DATA), Path(QLORA))
    examples = len(clean_set(world))
    exam = make_exam(world, questions=questions)
    steps = -(-examples // config.per_device_train_batch_size) * round(config.num_train_epochs)
    return Outline(
        model=str(model),
        parameters=plan.parameters,
        bytes_16bit=plan.bytes_before,
        bytes_4bit=plan.bytes_after,
        examples=examples,
        questions=len(exam.facts) + len(exam.strangers),
        steps=steps,
    )


def run_demo(
    output: Path,
    *,
    model: Path = MODEL_FOLDER,
    questions: int = 320,
    seed: int = 0,
    on_event: OnEvent | None = None,
    **changes: Any,
) -> DemoResult:
    """Tell the whole story.

    Args:
        output: the folder to write; one that an earlier demo wrote is replaced.
        model: a base that `fourbit.demo.pretrain` made.
        questions: held-out facts to ask for.
        seed: of the adapters' first values and of the order of the examples.
        on_event: is told what goes on.
        changes: keys of `TrainConfig` to set otherwise.

    Raises:
        InputError: the output holds what no demo wrote, or the model is none for the demo.
    """
    began = time.monotonic()
    tell = on_event or (lambda event: None)
    plan = outline(model=model, questions=questions)
    world = read_world(model)
    _begin(output)
    tell(Chapter("What is here", _describe(plan)))
    _write_data(output / DATA, world)
    _quantize(model, output / BASE, tell)
    exam = make_exam(world, questions=questions)

    tell(Chapter("Before: the base only continues text", ()))
    before = _ask(output / BASE, None, exam, tell)
    tell(Chapter("", _say(exam, before)))

    settings = {"seed": seed, **changes}
    tell(Chapter("Training: LoRA on the frozen 4-bit base (QLoRA)", (f"{plan.examples} conversations to learn from.",)))
    qlora = _train(output / BASE, output, QLORA, tell, **settings)
    after = _ask(output / BASE, output / QLORA, exam, tell)
    tell(Chapter("After: it answers", _say(exam, after)))

    tell(Chapter("Beside it: the same with the base in 16 bits", ()))
    lora = _train(model, output, LORA, tell, format="none", **settings)
    beside = _ask(model, output / LORA, exam, tell, format="none")
    tell(Chapter("", _say(exam, beside)[-1:]))
    result = DemoResult(
        output=str(output),
        exact_match_before=before.exact_match,
        exact_match_after=after.exact_match,
        exact_match_16bit=beside.exact_match,
        admitted_before=before.admitted,
        admitted_after=after.admitted,
        admitted_16bit=beside.admitted,
        tokens_per_second=qlora.tokens_per_second,
        tokens_per_second_16bit=lora.tokens_per_second,
        peak_bytes=qlora.peak_bytes,
        bytes_16bit=plan.bytes_16bit,
        bytes_4bit=plan.bytes_4bit,
        seconds=time.monotonic() - began,
        report=str(output / QLORA / "report.html"),
        dialogues=tuple(
            (question.prompt, before.answers[place], after.answers[place]) for place, question in _shown(exam)
        ),
    )
    (output / RESULT).write_text(json.dumps(result.__dict__, indent=2) + "\n", encoding="utf-8")
    return result


def read_world(model: Path) -> World:
    """The world that a base was pretrained on.

    Raises:
        InputError: the folder does not say.
    """
    path = model / "pretraining.json"
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        return make_world(int(recipe["seed"]), people=int(recipe["people"]))
    except FileNotFoundError as error:
        raise InputError(
            f"{model} is no base model of the demo: it has no {path.name}, which `python -m fourbit.demo.pretrain`"
            " writes."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"{path} does not say which world the model was pretrained on.") from error


def _begin(output: Path) -> None:
    """Make the output folder ours and empty."""
    check_output(output, overwrite=True)
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    names = [DATA, BASE, QLORA, LORA, RESULT]
    manifest = {"written_by": f"fourbit {__version__}", "kind": "demo", "files": names}
    (output / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write_data(folder: Path, world: World) -> None:
    folder.mkdir()
    for name, records in (("clean", clean_set(world)), ("noisy", noisy_set(world))):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _quantize(model: Path, output: Path, tell: OnEvent) -> None:
    from fourbit.models.streaming import quantize_folder
    from fourbit.quant import QuantConfig

    report = quantize_folder(model, output, QuantConfig(), overwrite=False)
    tell(
        Chapter(
            "The base in 4 bits",
            (
                f"NF4 with double quantization: {report.bytes_before / 1e6:.1f} MB become"
                f" {report.bytes_after / 1e6:.1f} MB in {report.seconds:.1f} s.",
            ),
        )
    )


def _train(base: Path, output: Path, name: str, tell: OnEvent, **changes: Any) -> TrainResult:
    from fourbit.train import train

    config = training_config(base, output / DATA / "clean.jsonl", output / name, **changes)
    result = train(config, on_event=lambda event: tell(Training(event)))
    if not result.finished:
        raise KeyboardInterrupt  # the trainer has taken the first one to end its step in peace
    return result


def _ask(base: Path, adapter: Path | None, exam: Exam, tell: OnEvent, *, format: str | None = None) -> Score:
    from fourbit.generate import load_for_generation

    loaded = load_for_generation(base, adapter=adapter, format=format)
    return examine(loaded.model, loaded.tokenizer, exam, progress=lambda done, total: tell(Examining(done, total)))


def _shown(exam: Exam) -> Sequence[tuple[int, Question]]:
    """Some questions with their places in `Score.answers`: facts, one of each kind, and a stranger."""
    kinds: dict[str, tuple[int, Question]] = {}
    for place, question in enumerate(exam.facts):
        kinds.setdefault(question.attribute, (place, question))
    return [*list(kinds.values())[:_SHOWN], (len(exam.facts), exam.strangers[0])]


def _describe(plan: Outline) -> tuple[str, ...]:
    from fourbit.kernels import backends

    found = sorted({explained["backend"] for explained in backends().values()})
    return (
        f"A base model of {plan.parameters:,} parameters, pretrained on texts about a small made-up world.",
        f"{plan.examples:,} clean conversations to finetune on, {plan.questions:,} held-out questions about facts that"
        " none of them asks for.",
        f"Kernels: {', '.join(found)}. `fourbit doctor` says more.",
    )


def _say(exam: Exam, score: Score) -> tuple[str, ...]:
    """Some dialogues and the score."""
    return (
        *(f"{question.prompt}  →  {' '.join(score.answers[place].split())}" for place, question in _shown(exam)),
        f"Held-out exact match {score.exact_match:.1%} of {len(exam.facts)};"
        f" says that it does not know {score.admitted:.1%} of {len(exam.strangers)} strangers.",
    )
