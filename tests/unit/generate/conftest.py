"""A real model that is ready to be talked to, and things to ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourbit.generate import Loaded, load_for_generation

BEGINNINGS = [
    "Once upon a time, there was a",
    "Lily and Tom",
    "One day, a little dog named Max found a big red ball in the park. Max was",
    "The sun",
    "Tim had a toy car. He",
    "A bird sat on a tree. It saw a cat, and",
    'Mom said, "Do not',
    "It was a very cold day, and the snow fell on the house where Sue and her old grandma lived. Sue wanted",
    "Ben",
    "There was a boy who loved to",
    "In the forest",
]


@pytest.fixture(scope="session")
def loaded(stories_model: Path) -> Loaded:
    """The stories model in NF4, computed in fp32."""
    return load_for_generation(stories_model, dtype="float32")


@pytest.fixture
def model(loaded: Loaded) -> Any:
    return loaded.model


@pytest.fixture
def tokenizer(loaded: Loaded) -> Any:
    return loaded.tokenizer


@pytest.fixture(scope="session")
def beginnings() -> list[str]:
    """Beginnings of stories, of 4 to 50 tokens."""
    return BEGINNINGS
