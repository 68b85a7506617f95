"""Files of answers to be made into a file of ratings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourbit.errors import InputError
from fourbit.evaluate.answers import System, pair_systems, read_questions, read_systems, same_prompts
from fourbit.evaluate.judge.asking import Asked, Pace, Progress, ask_all
from fourbit.evaluate.judge.endpoint import Address, Endpoint
from fourbit.evaluate.judge.money import Budget, Estimate, Prices, estimate
from fourbit.evaluate.judge.ratings import Judgement, check_output, judge_replies
from fourbit.evaluate.judge.requests import Request, Settings, plan_requests
from fourbit.evaluate.judge.store import Reply, Store
from fourbit.evaluate.judge.template import Template, load_template
from fourbit.evaluate.ratings import write_ratings

__all__ = ["Job", "Judged", "check_terms"]


@dataclass(frozen=True)
class Judged:
    """What a run of a job has made.

    Attributes:
        asked: what came of asking.
        judgements: all that are there now, those of earlier runs included.
        missing: how many are not.
        budget: what they cost.
        written: whether the output was.
    """

    asked: Asked
    judgements: list[Judgement]
    missing: int
    budget: Budget
    written: bool


@dataclass(frozen=True)
class Job:
    """What is to be judged, checked as far as it can be without the judge. Nothing is written before `run`.

    Attributes:
        systems, mode, settings, prices: as they were given.
        reference: the name of the system that all others are compared with; None: all with all.
        prompts: how many.
        requests: all questions to the judge, those that are answered already included.
        output, cache: where ratings and replies go.
        sentences: what a person should know.
    """

    systems: tuple[System, ...]
    reference: str | None
    mode: str
    settings: Settings
    prices: Prices
    max_cost: float | None
    prompts: int
    requests: tuple[Request, ...]
    output: Path
    cache: Path
    sentences: tuple[str, ...]

    @classmethod
    def plan(
        cls,
        sources: Sequence[str | tuple[str, Path]],
        output: Path,
        *,
        settings: Settings,
        mode: str = "verdict",
        reference: str | None = None,
        prompt: Path | None = None,
        questions: str | Path | None = None,
        common: bool = False,
        prices: Prices | None = None,
        max_cost: float | None = None,
        cache: Path | None = None,
        overwrite: bool = False,
    ) -> Job:
        """Read the answers and lay out the questions.

        Args:
            sources: see `read_systems`.
            mode, prompt: see `load_template`.
            reference: see `pair_systems`; score mode needs one.
            questions, common: see `same_prompts`.
            cache: NAME.cache.sqlite beside the output by default.
            max_cost: money that may be spent on these ratings, earlier runs included.
            overwrite: replace ratings that this run would not make again.

        Raises:
            InputError, OutputExists: says what is wrong.
        """
        prices = prices or Prices()
        template = check_terms(mode, prompt=prompt, reference=reference, prices=prices, max_cost=max_cost)
        systems = read_systems(sources)
        pairs = pair_systems(systems, reference)
        asked = same_prompts(systems, read_questions(questions) if questions else None, common=common)
        requests = plan_requests(pairs, asked, template, settings)
        check_output(output, requests, judge=settings.judge, overwrite=overwrite)
        cache = cache or output.with_name(f"{output.name}.cache.sqlite")
        if cache.resolve() == output.resolve():
            raise InputError(f"{output} cannot be the output and the cache; choose another cache.")
        return cls(
            systems=tuple(systems),
            reference=None if reference is None else pairs[0][1].name,
            mode=mode,
            settings=settings,
            prices=prices,
            max_cost=max_cost,
            prompts=len(asked),
            requests=tuple(requests),
            output=output,
            cache=cache,
            sentences=_sentences(systems, asked, common),
        )

    def look(self, concurrency: int) -> tuple[dict[str, Reply], Estimate, Budget]:
        """The replies that are there already, what the rest will cost, and what these have cost; writes nothing.

        Raises:
            InputError: see `Store`.
        """
        with Store(self.cache, read_only=True) as store:
            known = store.replies(request.key for request in self.requests)
            budget = self._budget(store, known)
        missing = self._missing(known)
        forecast = estimate(
            [request.prompt_bytes for request in missing],
            list(known.values()),
            prices=self.prices,
            max_tokens=self.settings.max_tokens,
            concurrency=concurrency,
        )
        return known, forecast, budget

    def run(
        self,
        address: Address,
        *,
        pace: Pace | None = None,
        partial: bool = False,
        progress: Progress = lambda what, done, total: None,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> Judged:
        """Ask what is not answered yet, and write the ratings when all is.

        Args:
            partial: write them also where some are missing.

        Raises:
            InputError: see `Store`, `Endpoint`.
        """
        pace = pace or Pace()
        with Store(self.cache) as store:
            known = store.replies(request.key for request in self.requests)
            budget = self._budget(store, known)
            missing = self._missing(known)

            async def ask() -> Asked:
                async with Endpoint(address, self.settings, timeout_s=pace.timeout_s) as endpoint:
                    return await ask_all(
                        missing,
                        endpoint,
                        store,
                        budget,
                        settings=self.settings,
                        pace=pace,
                        partial=partial,
                        progress=progress,
                        say=say,
                    )

            asked = asyncio.run(ask()) if missing else Asked()
            replies = store.replies(request.key for request in self.requests)
        judgements = judge_replies(self.requests, replies, self.mode)
        left = len(self.requests) - len(judgements)
        whole = not left or (partial and bool(judgements) and not asked.interrupted)
        if whole:
            write_ratings(self.output, (each.record(self.settings.judge, self.mode) for each in judgements))
        return Judged(asked, judgements, left, budget, whole)

    def _missing(self, known: dict[str, Reply]) -> list[Request]:
        """One question for each key: equal answers make equal questions, which are asked once."""
        distinct = {request.key: request for request in self.requests if request.key not in known}
        return list(distinct.values())

    def _budget(self, store: Store, known: dict[str, Reply]) -> Budget:
        budget = Budget(self.prices, self.max_cost)
        for reply in known.values():
            budget.prompt_tokens += reply.prompt_tokens
            budget.completion_tokens += reply.completion_tokens
            budget.spent += self.prices.cost(reply.prompt_tokens, reply.completion_tokens)
        for tokens in store.uncertain(request.key for request in self.requests):
            budget.uncertain += self.prices.cost(*tokens)
        return budget


def check_terms(
    mode: str, *, prompt: Path | None, reference: str | None, prices: Prices, max_cost: float | None
) -> Template:
    """Refuse what no answers could be judged with; returns what the judge is asked.

    Raises:
        InputError: says what is wrong.
    """
    template = load_template(mode, prompt)
    if mode == "scores" and reference is None:
        raise InputError("Scores are compared with those of one system; name it with --reference.")
    Budget(prices, max_cost)
    return template


def _sentences(systems: Sequence[System], asked: dict[str, tuple[str | int, str]], common: bool) -> tuple[str, ...]:
    found = []
    if common and (left := len({key for system in systems for key in system.answers}) - len(asked)):
        found.append(f"{left} prompts are left out, as not all systems answer them.")
    for system in systems:
        if empty := sum(not system.answers[key].text.strip() for key in asked):
            found.append(f"{system.name} has {empty} empty answers, which are judged as they are.")
    return tuple(found)
