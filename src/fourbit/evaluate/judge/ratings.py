"""The file of ratings: one JSON record for each judgement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.errors import OutputExists
from fourbit.evaluate.judge.requests import Request
from fourbit.evaluate.judge.store import Reply
from fourbit.evaluate.judge.verdicts import Verdict, read_reply

__all__ = ["Judgement", "check_output", "judge_replies"]


@dataclass(frozen=True)
class Judgement:
    """A question, the reply, and what it says."""

    request: Request
    reply: Reply
    verdict: Verdict

    @property
    def points(self) -> float:
        """Of the pair's first system: 1 for a win, ½ for a tie, 0 for a loss; NaN where the reply does not say."""
        if self.verdict.label == -1:
            return float("nan")
        if self.verdict.label == 3:
            return 0.5
        return float(self.verdict.label == self.request.order)

    @property
    def scores(self) -> tuple[float, float] | None:
        """Of the pair's systems, in the pair's order."""
        if self.verdict.scores is None:
            return None
        first, second = self.verdict.scores
        return (first, second) if self.request.order == 1 else (second, first)

    def record(self, judge: str, mode: str) -> dict[str, Any]:
        request, reply = self.request, self.reply
        first, second = request.shown
        scores = {"scores": self.verdict.scores} if mode == "scores" else {}
        return {
            "id": request.id,
            "first": first,
            "second": second,
            "order": request.order,
            "label": self.verdict.label,
            **scores,
            "judge": judge,
            "mode": mode,
            "template": request.template.name,
            "reply": reply.text,
            "finish_reason": reply.finish_reason,
            "characters": [len(request.first.text), len(request.second.text)],
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }


def judge_replies(requests: Iterable[Request], replies: Mapping[str, Reply], mode: str) -> list[Judgement]:
    """The judgements that are there, in the order of the questions."""
    return [
        Judgement(request, reply, read_reply(reply.text, mode))
        for request in requests
        if (reply := replies.get(request.key)) is not None
    ]


def check_output(path: Path, requests: Sequence[Request], *, judge: str, overwrite: bool) -> None:
    """Refuse an output that holds anything which this run would not write again.

    Raises:
        OutputExists: it does, or it is no file of ours.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputExists(f"{path} is no ordinary file; choose another output.")
    if not path.exists() or path.stat().st_size == 0:
        return
    known = {(str(request.id), *request.shown, judge, request.template.name) for request in requests}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            found = (str(record["id"]), record["first"], record["second"], record["judge"], record["template"])
            ours = isinstance(record["label"], int)
        except (ValueError, KeyError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise OutputExists(f"{path} exists and holds no ratings of fourbit judge; choose another output.")
        if not overwrite and found not in known:
            raise OutputExists(
                f"{path}, line {number}, is a rating of {found[1]} and {found[2]} by {found[3]} which this command"
                " would not make again; choose another output, or pass --overwrite."
            )
