"""What is wrong with data, before anything is trained on it: every example measured as the trainer would see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fourbit.data.checks import NOTE, PROBLEM, Check, judge
from fourbit.data.colours import Coloured, colour
from fourbit.data.encode import Encoder, Refused
from fourbit.data.prepare import Gathered, gather, nothing_left
from fourbit.data.survey import Measured, Progress, Survey, survey_examples, uncut_encoder
from fourbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Lint", "lint_data", "preview_data"]

BINS = 16


@dataclass(frozen=True)
class Lint:
    """What `lint_data` found.

    Attributes:
        sentences: what was recognised and split.
        checks: one for each question, with its verdict.
        numbers: counts, for programs.
        histogram: lowest length, highest length (None for the last, which takes all the rest), and examples.
        samples: examples, token by token.
        max_length: as it was given.
        lengths: tokens of each training example that is learned from, after the cut.
        refusal: why this cannot be trained on, in the words of the trainer; None where it can.
    """

    sentences: tuple[str, ...]
    checks: tuple[Check, ...]
    numbers: dict[str, Any]
    histogram: tuple[tuple[int, int | None, int], ...]
    samples: tuple[Coloured, ...]
    max_length: int
    lengths: tuple[int, ...]
    refusal: str | None = None

    def with_(self, **changes: Any) -> Lint:
        """The same with some attributes changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file, without the samples."""
        verdicts = Counter(check.verdict for check in self.checks)
        return {
            **self.numbers,
            "problems": verdicts[PROBLEM],
            "notes": verdicts[NOTE],
            "checks": [check.to_dict() for check in self.checks],
            "histogram": [{"from": low, "to": high, "examples": count} for low, high, count in self.histogram],
            "sentences": list(self.sentences),
        }


def lint_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: str = "answers",
    eval_source: str | None = None,
    eval_size: float | None = None,
    seed: int = 42,
    split: str | None = None,
    limit: int | None = None,
    samples: int = 6,
    progress: Progress | None = None,
) -> Lint:
    """Measure every example as the trainer would see it, and judge.

    Args:
        source, tokenizer, max_length, loss_on, eval_source, eval_size, seed, split, limit: see `prepare_data`.
        samples: examples to show token by token; some of those that something befalls are shown besides.
        progress: is told how far it is.

    Raises:
        InputError: the data cannot be read or are of no known kind.
    """
    gathered = _gather(
        source, tokenizer, max_length=max_length, loss_on=loss_on, eval_source=eval_source, eval_size=eval_size,
        seed=seed, split=split, limit=limit,
    )  # fmt: skip
    survey = survey_examples(gathered, tokenizer, max_length=max_length, loss_on=loss_on, progress=progress)
    return Lint(
        sentences=gathered.sentences,
        checks=judge(survey),
        numbers=_numbers(survey),
        histogram=_histogram([each.tokens for each in survey.every if each.tokens]),
        samples=_samples(survey, samples),
        max_length=max_length,
        lengths=tuple(min(each.tokens, max_length) for each in survey.train if each.survives),
        refusal=_refusal(survey, source, eval_source),
    )


def preview_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_length: int,
    loss_on: str = "answers",
    split: str | None = None,
    limit: int | None = None,
) -> list[Coloured]:
    """A few examples, spread over the data, token by token.

    Raises:
        InputError: the data cannot be used, or the template refuses all of them.
    """
    if count < 1:
        raise InputError(f"`--count` is {count}; at least one record must be shown.")
    gathered = _gather(source, tokenizer, max_length=max_length, loss_on=loss_on, eval_size=0, split=split, limit=limit)
    encoder = uncut_encoder(tokenizer, loss_on=loss_on)
    shown: list[Coloured] = []
    refused = ""
    for example in _spread(gathered.train, count):
        if len(shown) == count:
            break
        try:
            shown.append(colour(example, encoder, max_length=max_length))
        except Refused as reason:
            refused = str(reason)
    if not shown:
        raise InputError(f"{source}: the chat template refuses every example: {refused}.")
    return shown


def _gather(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: str,
    eval_source: str | None = None,
    eval_size: float | None = None,
    seed: int = 42,
    split: str | None = None,
    limit: int | None = None,
) -> Gathered:
    cutting = Encoder(tokenizer, max_length=max_length, loss_on=loss_on)
    return gather(source, cutting, eval_source=eval_source, eval_size=eval_size, seed=seed, split=split, limit=limit)


def _refusal(survey: Survey, source: str, eval_source: str | None) -> str | None:
    for measured, name in ((survey.train, source), (survey.held, eval_source)):
        if name is None or not measured or any(each.survives for each in measured):
            continue
        refused = Counter(each.refused for each in measured if each.refused)
        cut = sum(not each.refused and each.tokens > survey.max_length for each in measured)
        return nothing_left(
            name,
            survey.max_length,
            len(measured),
            unlearned=cut,
            wordless=len(measured) - cut - refused.total(),
            refused=refused,
        )
    return None


def _numbers(survey: Survey) -> dict[str, Any]:
    trained = [each for each in survey.train if each.survives]
    lengths = sorted(each.tokens for each in survey.every if each.tokens)
    tokens = sum(min(each.tokens, survey.max_length) for each in trained)
    learned = sum(each.learned for each in trained)

    def quantile(share: float) -> int:
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))] if lengths else 0

    lost = sum(not each.survives for each in survey.every)
    return {
        "records": sum(found.records for found in survey.gathered.recognised),
        "dropped_records": survey.gathered.dropped + lost,
        "examples": len(trained),
        "eval_examples": sum(each.survives for each in survey.held),
        "tokens": tokens,
        "labelled_tokens": learned,
        "labelled_share": learned / tokens if tokens else 0.0,
        "max_length": survey.max_length,
        "lengths": {
            "median": quantile(0.5),
            "p90": quantile(0.9),
            "p99": quantile(0.99),
            "longest": lengths[-1] if lengths else 0,
        },
    }


def _histogram(lengths: list[int]) -> tuple[tuple[int, int | None, int], ...]:
    """Bins of one width; where a few are far longer than the rest, a last bin takes them."""
    if not lengths:
        return ()
    ordered = sorted(lengths)
    usual = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    top = ordered[-1] if ordered[-1] <= 2 * usual else usual
    width = max(1, -(-top // BINS))
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    width = next(step for step in steps if step >= width)
    bins = -(-top // width)
    counts = Counter(min((length - 1) // width, bins) for length in lengths)
    return tuple(
        (number * width + 1, (number + 1) * width if number < bins else None, counts[number])
        for number in range(max(counts) + 1)
    )


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Items from all over, then the others, for those that cannot be shown."""
    stride = max(1, len(items) // count)
    order = dict.fromkeys([*range(0, len(items), stride), *range(len(items))])
    return [items[number] for number in order][: 20 * count]


BEFALLEN: tuple[tuple[str, Callable[[Measured], bool]], ...] = (
    ("its answer is cut off in the middle", lambda each: each.survives and each.lost > 0),
    ("its whole answer is cut off: left out", lambda each: not each.survives and each.lost > 0),
    (
        "nothing of its answer is in the template's text: left out",
        lambda each: not each.survives and each.tokens > 0 and not each.lost,
    ),
    ("some of its answers carry no loss", lambda each: each.survives and bool(each.example.silent)),
    ("it does not learn to stop", lambda each: each.survives and not each.ended and each.example.ends),
)
"""What is shown besides, and of which examples it is true."""


def _samples(survey: Survey, count: int) -> tuple[Coloured, ...]:
    """Examples as they mostly are, and one or two of each thing that befalls some."""
    usual = [each for each in survey.train if each.survives and each.tokens <= survey.max_length]
    chosen = [(each, "") for each in _spread(usual, count)[:count]] if count else []
    for remark, applies in BEFALLEN:
        chosen += [(each, remark) for each in [each for each in survey.every if applies(each)][:2]]
    return tuple(
        colour(each.example, survey.encoder, max_length=survey.max_length, remark=remark) for each, remark in chosen
    )
