"""Scores of a model: perplexity, and multiple-choice questions."""

from fourbit.evaluate.mmlu import Mmlu, measure_mmlu
from fourbit.evaluate.perplexity import Perplexity, measure_perplexity
from fourbit.evaluate.questions import Exam, Question, read_exam
from fourbit.evaluate.texts import read_documents

__all__ = [
    "Exam",
    "Mmlu",
    "Perplexity",
    "Question",
    "measure_mmlu",
    "measure_perplexity",
    "read_documents",
    "read_exam",
]
