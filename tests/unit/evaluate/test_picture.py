"""The picture is a PNG file, or nothing and a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from fourbit.errors import InputError, MissingExtra
from fourbit.evaluate import bradley_terry
from fourbit.evaluate.picture import check_can_draw, draw, win_matrix

MATCHES = [("a", "b", 1, "1"), ("b", "a", 3, "1"), ("b", "c", 2, "2"), ("c", "b", 2, "2"), ("a", "b", 2, "3")]


def test_the_matrix() -> None:
    table = bradley_terry(MATCHES, samples=20)
    place = {row.model: number for number, row in enumerate(table)}
    matrix = win_matrix(table)
    assert matrix[place["a"], place["b"]] == pytest.approx(0.5)
    assert matrix[place["c"], place["b"]] == 0.5
    assert np.isnan(matrix[place["a"], place["c"]])
    assert np.isnan(np.diagonal(matrix)).all()


@pytest.mark.parametrize("count", [2, 40])
def test_a_png_and_nothing_else(tmp_path: Path, count: int) -> None:
    matches = [(f"a model {n}", "b", 1 + n % 2, str(prompt)) for n in range(count - 1) for prompt in range(3)]
    draw(bradley_terry(matches, samples=20), tmp_path / "ranking.png")
    (file,) = tmp_path.iterdir()
    assert file.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"ends in \.png"):
        check_can_draw(tmp_path / "ranking.jpg")
    with pytest.raises(InputError, match="There is no folder"):
        check_can_draw(tmp_path / "nowhere/ranking.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"fourbit\[eval\]"):
        check_can_draw(tmp_path / "ranking.png")
