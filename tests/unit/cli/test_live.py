"""What somebody sees of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourbit.cli.live import LINES, Watcher
from fourbit.train.events import Began, Evaluated, Said, Saved, Stepped


def stepped(step: int, steps: int) -> Stepped:
    rate = None if step < 3 else 1234.5
    left = None if step < 3 else 200.0
    return Stepped(step, steps, 0.5, 2.34567, 2e-4, 1.0, 100, rate, 2_000_000_000, left)


@pytest.mark.parametrize("steps", [3, 40, 5000])
def test_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str], steps: int) -> None:
    with Watcher() as watcher:
        watcher(Said("Recognised [bold]Alpaca[/bold]."))
        watcher(Began(0, steps))
        for step in range(1, steps + 1):
            watcher(stepped(step, steps))
        watcher(Evaluated(steps, 1, 2, None))
        watcher(Evaluated(steps, 2, 2, 1.5))
        watcher(Saved(steps, Path("checkpoint-1")))
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert lines[0] == "Recognised [bold]Alpaca[/bold]."
    assert lines[1] == f"step 1/{steps}  loss 2.3457  lr 0.0002  2.0 GB"
    last = f"step {steps}/{steps}  loss 2.3457  lr 0.0002  1,234 tokens/s  2.0 GB  3 min 20 s left"
    assert lines[-2:] == [last, f"step {steps}  evaluation loss 1.5000"]
    assert len(lines) <= LINES + 4


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with Watcher() as watcher:
        watcher(Began(2, 40))
        watcher(stepped(40, 40))
        watcher(Said("Stopping [now]."))
        watcher(Saved(40, Path("checkpoint-40")))
    shown = capsys.readouterr().err
    for part in ("40/40", "loss 2.3457", "1,234 tokens/s", "3 min 20 s left", "Stopping [now].", "saved checkpoint-40"):
        assert part in shown
