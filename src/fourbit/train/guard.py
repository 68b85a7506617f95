"""Losses that cannot rot in silence: a step without numbers is left out, and a run that goes astray says so.

A step whose loss or gradient is NaN or infinite changes nothing: the weights and the optimizer's state stay as they are
to the bit. The step counts, though: the learning rate and the place in the data depend on its number alone, so that
what follows is what it would have been. Too many such steps in a row end the run.

With float16 gradients overflow now and then while the scaler looks for its factor, which it lowers each time. That is
its own affair as long as it has room to do so: above a factor of 1, and with a finite loss.

A divergence is no single bad batch: five losses in a row lie far above what came before them. "Far" is measured by the
median and the median deviation of up to 64 losses, which neither a few outliers nor the noise of small batches move.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median

__all__ = ["GUARD_FILE", "Guard", "name_places"]

GUARD_FILE = "guard.json"

WINDOW = 64
"""Losses that say what is usual."""

FEWEST = 16
"""Fewer say nothing: the first steps of a run are never flagged."""

IN_A_ROW = 5
"""Losses that have to be far above it, one after the other: with log-normal noise of a standard deviation of 1 one in
55 is, and 5 in a row are in one step of 500 million."""

DEVIATIONS = 8
"""How far: so many standard deviations, as a normal distribution's median deviation gives them."""

LEAST_RISE = 0.2
"""And by this share of the median at least, as there are runs with hardly any noise."""

_NORMAL = 1.4826
"""Standard deviation of a normal distribution, in median deviations."""

_NAMED = 24
"""Records that a sentence names at most."""


class Guard:
    """Judges the steps of a run.

    Args:
        most: left out in a row, so many steps end the run.

    Attributes:
        skipped: steps that were left out so far.
        in_a_row: of them, without a good one since.
        last_good: the last step that gave numbers.
        diverged: whether the losses were flagged; once in a run.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.skipped = self.in_a_row = 0
        self.last_good: int | None = None
        self.diverged = False
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._newest: deque[float] = deque(maxlen=IN_A_ROW)

    def judge(self, step: int, loss: float, norm: float, *, scale: float | None) -> str | None:
        """What is wrong with a step, before its weights change; None if nothing is.

        Args:
            loss: of the step.
            norm: of its gradients.
            scale: what the loss is multiplied with in float16, before the scaler has seen these gradients; else None.
        """
        fault = None
        if not math.isfinite(loss):
            fault = f"its loss is {loss}"
        elif not math.isfinite(norm) and (scale is None or scale <= 1):
            fault = f"the norm of its gradients is {norm}"
        if fault is None:
            self.in_a_row, self.last_good = 0, step
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return fault

    @property
    def is_over(self) -> bool:
        """Whether too many were left out in a row."""
        return self.in_a_row >= self.most

    def watch(self, loss: float) -> str | None:
        """Look at the finite loss of a step; gives a sentence the first time that a run diverges."""
        self._newest.append(loss)
        if len(self._newest) < IN_A_ROW:
            return None
        sentence = None
        if len(self._usual) >= FEWEST and not self.diverged:
            level = median(self._usual)
            deviation = _NORMAL * median(abs(each - level) for each in self._usual)
            if min(self._newest) > level + max(DEVIATIONS * deviation, LEAST_RISE * abs(level)):
                self.diverged = True
                told = ", ".join(f"{each:.4g}" for each in self._newest)
                sentence = (
                    f"The loss diverges: {told} in the last {IN_A_ROW} steps, {level:.4g} in those before; a lower"
                    " `learning_rate` or a longer warm-up usually helps."
                )
        self._usual.append(self._newest[0])
        return sentence

    # What a resumed run goes on with

    def save(self, path: Path) -> None:
        """Write it down. A run that was ended here may leave out as many again when it is taken up."""
        kept = {
            "skipped": self.skipped,
            "in_a_row": 0 if self.is_over else self.in_a_row,
            "last_good": self.last_good,
            "diverged": self.diverged,
            "usual": list(self._usual),
            "newest": list(self._newest),
        }
        path.write_text(json.dumps(kept), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take up what `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        self.skipped, self.in_a_row = found["skipped"], found["in_a_row"]
        self.last_good, self.diverged = found["last_good"], found["diverged"]
        self._usual.extend(found["usual"])
        self._newest.extend(found["newest"])


def name_places(places: Sequence[str]) -> str:
    """Where records came from, in few words: "a.jsonl, line 3, 9, 4; b.jsonl, line 1"."""
    groups: dict[str, list[str]] = {}
    for place in dict.fromkeys(places[:_NAMED]):
        before, space, number = place.rpartition(" ")
        groups.setdefault(f"{before}{space}", []).append(number)
    told = "; ".join(f"{before}{', '.join(numbers)}" for before, numbers in groups.items())
    return told + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
