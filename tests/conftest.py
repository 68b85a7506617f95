"""What the whole suite shares: real material outside the repository, and no network."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FOURBIT_SHARED", REPOSITORY.parent / "shared"))

# Set before any Hugging Face library is imported, as they read it only once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Triton's kernels run interpreted where no GPU can run them compiled. Triton reads this once, too; torch does not
# import Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts its background jobs with Ctrl-C ignored, and a process that ignores it hands that on to its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, so that no change fails by another's bug; `make test-search` looks for new ones. A loaded
# machine is no reason to fail.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def _shared(path: str) -> Path:
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is not in {SHARED}; set FOURBIT_SHARED to the folder that holds it")
    return found


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """A real pretrained LLaMA of 260,032 parameters, tied embeddings, in transformers' layout, fp32."""
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real texts and datasets; see the README in that folder."""
    return _shared("data")


@pytest.fixture
def same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `nn.Dropout` draw as our layers do: a seed, and the mask from it. So peft's layer sees the same masks.

    That both are distributed alike is `test_dropout`'s to show.
    """
    import torch

    from fourbit.kernels.dropout import draw_seed, keep_mask

    def forward(self: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        return x * keep_mask(x, draw_seed(), self.p) * (1 / (1 - self.p) if self.p < 1 else 0.0)

    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a GPU, and torch sees none"
