"""What a run would do, without doing it: everything is read and checked, and nothing written or trained."""

from __future__ import annotations

from typing import Any

from fourbit.nn.loss import IGNORE
from fourbit.train.config import TrainConfig
from fourbit.train.events import OnEvent, Said
from fourbit.train.model import count_parameters, load_trainable
from fourbit.train.planning import plan_run
from fourbit.train.run import look

__all__ = ["outline_run"]


def outline_run(config: TrainConfig, *, resume: bool, overwrite: bool, on_event: OnEvent) -> dict[str, Any]:
    """Numbers of a run: examples, tokens, steps, parameters.

    Raises:
        InputError: what `train` would raise before its first step.
    """
    config, _, material = look(config, resume=resume, overwrite=overwrite, on_event=on_event)
    if material is None:
        return {"output": config.output, "dry_run": True, "finished": True, "steps": 0, "config": config.to_full_dict()}
    plan = plan_run(config, material)
    on_event(Said(plan.sentence))
    trainable, parameters = count_parameters(load_trainable(config))
    lengths = [len(ids) for ids in material.train["input_ids"]]
    labelled = sum(label != IGNORE for labels in material.train["labels"] for label in labels[1:])
    return {
        "output": config.output,
        "dry_run": True,
        "finished": False,
        "examples": len(lengths),
        "eval_examples": 0 if material.evaluation is None else len(material.evaluation),
        "dropped_records": material.dropped,
        "rows": len(material.rows),
        "tokens": sum(lengths),
        "labelled_tokens": labelled,
        "longest": max(lengths),
        "max_length": material.max_length,
        "steps": material.steps(config),
        "planned_bytes": plan.planned_bytes,
        "planned_parts": None if plan.plan is None else dict(plan.plan.parts),
        "trainable_parameters": trainable,
        "parameters": parameters,
        "config": config.to_full_dict(),
    }
