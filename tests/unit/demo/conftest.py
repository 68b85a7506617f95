"""A base model of the demo in miniature, pretrained for a few steps: it knows nothing, and has every file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourbit.demo.pretrain import Recipe, pretrain

TINY = Recipe(
    people=12,
    vocabulary_size=512,
    hidden_size=64,
    intermediate_size=128,
    layers=1,
    sequence_length=128,
    batch_size=2,
    steps=3,
    warmup_steps=1,
)


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """What `tiny_base` is made of."""
    return TINY


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a model."""
    return pretrain(TINY, tmp_path_factory.mktemp("pretrained"), device="cpu")
