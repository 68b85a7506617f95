"""Scores of a model. So far: perplexity."""

from fourbit.evaluate.perplexity import Perplexity, measure_perplexity
from fourbit.evaluate.texts import read_documents

__all__ = ["Perplexity", "measure_perplexity", "read_documents"]
