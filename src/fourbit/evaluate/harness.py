"""Any task of lm-evaluation-harness on a model of ours: hellaswag, arc_easy, or a YAML file of the user's own.

What a task asks and how its answers count is the harness' part, and what comes out is what it would say itself. Ours is
the model, in 4 bits with its adapter, and how it is run: see `harness_model`.
"""

from __future__ import annotations

import difflib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.data.records import hub_answers, offline
from fourbit.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from torch import nn

__all__ = ["HarnessTasks", "TaskScore", "load_harness_tasks", "measure_tasks"]

RESAMPLES = 1000
"""Of the bootstrap behind standard errors that have no formula, F1's say; the harness takes a hundred times as many."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that are ready to be asked; see `load_harness_tasks`.

    Attributes:
        loaded: as the harness keeps them.
    """

    loaded: Mapping[str, Any] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """Of the single tasks, those of groups and tags included."""
        return list(self.loaded["tasks"])


@dataclass(frozen=True)
class TaskScore:
    """What a model scored in a task, or in a group of them.

    Attributes:
        metrics: name -> value, under the harness' own names ("acc", "acc_norm", "exact_match,strict-match"); None
            where it is no number.
        standard_errors: of those metrics that have one.
        shots: worked examples before each question; None for a group whose tasks differ.
        examples: asked in all.
    """

    metrics: dict[str, float | None]
    standard_errors: dict[str, float]
    shots: int | None
    examples: int


def load_harness_tasks(
    names: Sequence[str], *, shots: int | None = None, include_path: Path | None = None
) -> HarnessTasks:
    """Find tasks by name and load their data.

    Python's, numpy's and torch's random numbers are seeded as the harness does, as some tasks draw while they load.

    Args:
        names: of tasks, groups or tags of the harness.
        shots: worked examples before each question; by default what the task says. A task that forbids them has none.
        include_path: a folder with tasks of one's own as YAML; functions that these name are run.

    Raises:
        InputError: an unknown name, a broken task, or data that is not to be had. MissingExtra: lm_eval.
    """
    _require_harness()
    if shots is not None and shots < 0:
        raise InputError(f"There are to be {shots} shots; give 0 or more.")
    if not names:
        raise InputError("No task is named; give hellaswag, say.")
    if include_path is not None and not any(include_path.rglob("*.yaml")):
        raise InputError(f"{include_path} holds no task; give a folder of .yaml files.")
    _seed()
    with _quiet():
        manager, on_hub = _manager(names, include_path)
        reachable = not on_hub or hub_answers()
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        with nullcontext() if reachable else offline():
            for name in names:
                found = _load(manager, name, reachable)
                if again := sorted(loaded["tasks"].keys() & found["tasks"].keys()):
                    raise InputError(f"The task {again[0]} is asked for twice; {name} holds it, too.")
                for kind, kept in loaded.items():
                    kept.update(found.get(kind, {}))
    for name, task in loaded["tasks"].items():
        _refuse(name, task)
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return HarnessTasks(loaded)


def measure_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: HarnessTasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskScore]:
    """What a model scores in tasks, and in the groups that were asked for.

    Args:
        model: a causal language model of transformers, quantized or not, with an adapter or not; `eval()` afterwards.
        tokenizer: the model's own; it is given a pad token if it has none.
        tasks: see `load_harness_tasks`.
        limit: the first so many examples of each task.
        batch_size: rows in one forward pass.
        max_length: tokens that the model reads at most; longer contexts lose their beginning, as with the harness.
        chat: ask in the tokenizer's chat template.
        progress: called with the requests done, and how many there are of this kind.

    Raises:
        InputError: a setting out of range, or a tokenizer without a chat template.
    """
    for name, value in {"batch size": batch_size, "limit": limit}.items():
        if value is not None and value < 1:
            raise InputError(f"The {name} is {value}; it must be 1 or more.")
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and not 2 <= max_length <= (longest or max_length):
        raise InputError(
            f"The longest context is to have {max_length} tokens; this model takes 2 to {longest or 'any'}."
        )
    if chat and tokenizer.chat_template is None:
        raise InputError("The tokenizer has no chat template; ask without one.")
    from lm_eval import evaluator

    from fourbit.evaluate.harness_model import HarnessModel

    _seed()
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=_seeds()[1])
    with _quiet():
        found = evaluator.evaluate(
            HarnessModel(model, tokenizer, batch_size=batch_size, max_length=max_length, progress=progress),
            tasks.loaded,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    rows = found["results"] | found.get("groups", {})
    return {name: _score(row, found["n-shot"].get(name), _examples(name, found)) for name, row in rows.items()}


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "Other tasks need lm-evaluation-harness; install it with `pip install 'fourbit[harness]'`."
        ) from error


def _manager(names: Sequence[str], include_path: Path | None) -> tuple[Any, bool]:
    """The harness' list of tasks, and whether any of these names is on its own list, whose data is on the hub.

    Raises:
        InputError: a name is on no list.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own, False  # without the ten thousand others, which take seconds to list
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them all."
            raise InputError(f"lm-evaluation-harness has no task {name!r}; {hint}")
    return manager, True


def _load(manager: Any, name: str, reachable: bool) -> Mapping[str, Any]:
    """One task, group or tag with its data.

    Raises:
        InputError: whatever went wrong, as it lies in the task or its data.
    """
    try:
        found: Mapping[str, Any] = manager.load([name])
    except ModuleNotFoundError as error:
        raise InputError(f"The task {name} needs {error.name}, which is not installed.") from error
    except Exception as error:
        if not reachable:
            raise InputError(
                f"The data of the task {name} is not in the local cache of datasets, and the hub cannot be reached"
                " (offline?)."
            ) from error
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise InputError(f"The task {name} cannot be loaded: {reason}.") from error
    return found


def _refuse(name: str, task: Any) -> None:
    """Raise InputError for a task that needs what we do not give."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"The task {name} runs code that the model wrote, which fourbit does not do.")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"The task {name} shows the model more than text, which fourbit does not do.")


def _score(row: Mapping[str, Any], shots: Any, examples: int) -> TaskScore:
    """Out of a row of the harness, whose keys are "metric,filter" and "metric_stderr,filter"."""
    metrics: dict[str, float | None] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma:
            continue  # name, alias, the number of examples
        name = metric.removesuffix("_stderr") + ("" if kind == "none" else f",{kind}")
        number = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
        if not metric.endswith("_stderr"):
            metrics[name] = number
        elif number is not None:
            errors[name] = number
    return TaskScore(metrics, errors, shots if isinstance(shots, int) else None, examples)


def _examples(name: str, found: Mapping[str, Any]) -> int:
    """How many were asked in a task, or in all tasks of a group."""
    counts = found["n-samples"]
    if name in counts:
        return int(counts[name]["effective"])
    return sum(_examples(child, found) for child in found["group_subtasks"].get(name, ()))


def _seeds() -> tuple[int, int]:
    """Of Python, and of everything else."""
    from lm_eval import defaults

    return defaults.DEFAULT_RANDOM_SEED, defaults.DEFAULT_OTHER_SEED


def _seed() -> None:
    import numpy as np
    import torch

    first, other = _seeds()
    random.seed(first)
    np.random.seed(other)
    torch.manual_seed(other)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and remarks of the harness and of datasets."""
    import datasets
    import lm_eval.api.task as task

    bar, log = task.tqdm, logging.getLogger("lm_eval")
    level = log.level
    task.tqdm = lambda rows, **_: rows
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        task.tqdm = bar
        log.setLevel(level)
