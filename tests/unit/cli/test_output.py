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


def test_what_is_done_soon_is_not_told_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    with output.progress() as progress:
        progress("quantizing", 1, 2)
        progress("quantizing", 2, 2)
    assert capsys.readouterr().err == ""


def test_what_takes_long_is_told_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.progress() as progress:
        for done in range(1, 11):
            now = 10.0 * done
            progress("generating, 5 tokens/s", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "generating, 5 tokens/s: 3 of 10, 1 min 10 s left",
        "generating, 5 tokens/s: 6 of 10, 40.0 s left",
        "generating, 5 tokens/s: 9 of 10, 10.0 s left",
        "generating, 5 tokens/s: 10 of 10",
    ]
