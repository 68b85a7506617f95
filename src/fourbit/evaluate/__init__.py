"""Scores of a model: perplexity, multiple-choice questions, other tasks, and what raters say of its answers.

Each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "Agreement": "fourbit.evaluate.agreement",
    "Exam": "fourbit.evaluate.questions",
    "HarnessTasks": "fourbit.evaluate.harness",
    "Matches": "fourbit.evaluate.matches",
    "Mmlu": "fourbit.evaluate.mmlu",
    "Perplexity": "fourbit.evaluate.perplexity",
    "Question": "fourbit.evaluate.questions",
    "Ranking": "fourbit.evaluate.ranking",
    "Rating": "fourbit.evaluate.ratings",
    "Share": "fourbit.evaluate.shares",
    "TaskScore": "fourbit.evaluate.harness",
    "bradley_terry": "fourbit.evaluate.likelihood",
    "elo": "fourbit.evaluate.tournament",
    "load_harness_tasks": "fourbit.evaluate.harness",
    "measure_agreement": "fourbit.evaluate.agreement",
    "measure_mmlu": "fourbit.evaluate.mmlu",
    "measure_perplexity": "fourbit.evaluate.perplexity",
    "measure_shares": "fourbit.evaluate.shares",
    "measure_tasks": "fourbit.evaluate.harness",
    "read_documents": "fourbit.evaluate.texts",
    "read_exam": "fourbit.evaluate.questions",
    "read_ratings": "fourbit.evaluate.ratings",
}

__all__ = [
    "Agreement",
    "Exam",
    "HarnessTasks",
    "Matches",
    "Mmlu",
    "Perplexity",
    "Question",
    "Ranking",
    "Rating",
    "Share",
    "TaskScore",
    "bradley_terry",
    "elo",
    "load_harness_tasks",
    "measure_agreement",
    "measure_mmlu",
    "measure_perplexity",
    "measure_shares",
    "measure_tasks",
    "read_documents",
    "read_exam",
    "read_ratings",
]

if TYPE_CHECKING:
    from fourbit.evaluate.agreement import Agreement, measure_agreement
    from fourbit.evaluate.harness import HarnessTasks, TaskScore, load_harness_tasks, measure_tasks
    from fourbit.evaluate.likelihood import bradley_terry
    from fourbit.evaluate.matches import Matches
    from fourbit.evaluate.mmlu import Mmlu, measure_mmlu
    from fourbit.evaluate.perplexity import Perplexity, measure_perplexity
    from fourbit.evaluate.questions import Exam, Question, read_exam
    from fourbit.evaluate.ranking import Ranking
    from fourbit.evaluate.ratings import Rating, read_ratings
    from fourbit.evaluate.shares import Share, measure_shares
    from fourbit.evaluate.texts import read_documents
    from fourbit.evaluate.tournament import elo


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fourbit.evaluate' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
