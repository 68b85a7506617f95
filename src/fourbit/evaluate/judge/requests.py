"""What the judge is to be asked: each pair of systems on each prompt, in both orders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from fourbit.errors import InputError
from fourbit.evaluate.answers import Answered, System
from fourbit.evaluate.judge.template import Template

__all__ = ["Request", "Settings", "plan_requests"]


@dataclass(frozen=True)
class Settings:
    """How the judge is asked: its name at the endpoint, and what is sampled."""

    judge: str
    temperature: float = 0.2
    max_tokens: int = 1024
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.judge.strip():
            raise InputError("The judge's model has no name; give --model NAME.")
        if not 0 <= self.temperature <= 2:
            raise InputError(f"The temperature is {self.temperature}; it must be between 0 and 2.")
        if self.max_tokens < 1:
            raise InputError(f"The judge may write {self.max_tokens} tokens; it must be 1 or more.")


@dataclass(frozen=True)
class Request:
    """One question to the judge.

    Attributes:
        key: a hash of all that decides the reply: the judge, the messages, the sampling. The cache knows it by this.
        id: of the prompt.
        pair: the two systems as they were given.
        order: 1: shown in that order, 2: the other way round.
        question, first, second: what is shown.
        template: the words around it.
        prompt_bytes: of the messages in UTF-8.
    """

    key: str
    id: str | int
    pair: tuple[str, str]
    order: int
    question: str
    first: Answered
    second: Answered
    template: Template
    prompt_bytes: int

    @property
    def shown(self) -> tuple[str, str]:
        """The systems, the one shown first being first."""
        return self.pair if self.order == 1 else (self.pair[1], self.pair[0])

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.template.render(self.question, self.first.text, self.second.text)


def plan_requests(
    pairs: Sequence[tuple[System, System]],
    prompts: Mapping[str, tuple[str | int, str]],
    template: Template,
    settings: Settings,
) -> list[Request]:
    """Both orders of every pair on every prompt, prompt by prompt, so that what is cut short has whole prompts.

    Args:
        prompts: see `same_prompts`.
    """
    return [
        request
        for key, (name, question) in prompts.items()
        for one, other in pairs
        for request in _both_orders(
            (one.name, other.name), one.answers[key], other.answers[key], name, question, template, settings
        )
    ]


def _both_orders(
    pair: tuple[str, str],
    one: Answered,
    other: Answered,
    name: str | int,
    question: str,
    template: Template,
    settings: Settings,
) -> Iterator[Request]:
    for order, (first, second) in enumerate(((one, other), (other, one)), start=1):
        messages = template.render(question, first.text, second.text)
        size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
        yield Request(_key(messages, settings), name, pair, order, question, first, second, template, size)


def _key(messages: Sequence[Mapping[str, str]], settings: Settings) -> str:
    return hashlib.sha256(json.dumps([messages, asdict(settings)], sort_keys=True).encode()).hexdigest()
