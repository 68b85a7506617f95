"""stdout belongs to the result."""

from __future__ import annotations

import ctypes
import json
import sys

import pytest
from rich.text import Text

from fourbit.cli import output


@pytest.mark.parametrize("as_json", [True, False])
def test_stdout_holds_the_result_and_nothing_else(as_json: bool, capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    with output.result(as_json) as show:
        print("from Python")
        libc.puts(b"from C")
        libc.fflush(None)
        show({"loss": 0.5}, lambda: Text("loss 0.5"))
        print("after the result")
    print("outside", flush=True)
    out, err = capfd.readouterr()
    first, second = out.splitlines()
    assert (json.loads(first) == {"loss": 0.5}) if as_json else (first == "loss 0.5")
    assert second == "outside"
    assert err.splitlines() == ["from Python", "from C", "after the result"]


def test_stdout_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), output.result(True):
        raise RuntimeError
    print("here", flush=True)
    assert capfd.readouterr().out == "here\n"


def test_a_stdout_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with output.result(True) as show:
        print("from Python")
        show({"tokens": 3}, Text)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"tokens": 3}
    assert captured.err == "from Python\n"


def test_json_has_no_numbers_that_json_does_not_have() -> None:
    with pytest.raises(ValueError, match="JSON"), output.result(True) as show:
        show({"perplexity": float("inf")}, Text)


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    with output.progress() as progress:
        progress("quantizing", 1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1_044_992, "1.0 MB"),
        (3.3e9, "3.3 GB"),
        (5e13, "50,000.0 GB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert output.size(count) == text
