"""The embedded model: a small world, the texts and conversations about it, and the demo that finetunes on them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_FOLDER"]

MODEL_FOLDER = Path(__file__).parent / "model"
"""The base model that comes with the package, in transformers' layout; its README.md is the model card."""
