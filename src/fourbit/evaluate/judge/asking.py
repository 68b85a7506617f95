"""Asks all questions, several at a time, until each is answered or it is known that it will not be."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fourbit.errors import InputError
from fourbit.evaluate.judge.endpoint import Endpoint, Fatal, Refused, Transient
from fourbit.evaluate.judge.money import Budget, most_prompt_tokens
from fourbit.evaluate.judge.requests import Request, Settings
from fourbit.evaluate.judge.store import Reply, Store
from fourbit.words import duration

__all__ = ["Asked", "Pace", "ask_all"]

LONGEST_BACKOFF = 64
"""How many times the first wait a wait may be."""

FIRST_CONTACT_TRIES = 3
"""A server that nobody has seen yet is not waited for: its address is wrong, more likely."""


@dataclass(frozen=True)
class Pace:
    """How hard the server is asked.

    Attributes:
        concurrency: questions at a time.
        backoff_s: the first wait after a failure; it doubles each time, up to LONGEST_BACKOFF times this.
        patience_s: how long a question may go on failing; longer than a server's restart, or a rate limit's minute.
        timeout_s: for one reply, from the first byte sent to the last received.
    """

    concurrency: int = 8
    backoff_s: float = 1.0
    patience_s: float = 600.0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InputError(f"The concurrency is {self.concurrency}; it must be 1 or more.")
        for name, value in (("first wait", self.backoff_s), ("patience", self.patience_s)):
            if not 0 <= value < float("inf"):
                raise InputError(f"The {name} is {value} s; it must be 0 or more.")
        if not 0 < self.timeout_s < float("inf"):
            raise InputError(f"The time-out is {self.timeout_s} s; it must be more than 0.")


@dataclass
class Asked:
    """What came of it.

    Attributes:
        answered: how many were answered now.
        refused: key -> why there will be no answer.
        stopped: why not all were asked; None: all were.
        interrupted: a person or a scheduler asked to end.
        capped: the cap on spending is reached.
        retries: questions that had to be asked again.
        seconds: it took.
    """

    answered: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    interrupted: bool = False
    capped: bool = False
    retries: int = 0
    seconds: float = 0.0


Progress = Callable[[str, int, int], None]
"""Called with what is going on, how many are done, and how many there are."""


async def ask_all(
    requests: Sequence[Request],
    endpoint: Endpoint,
    store: Store,
    budget: Budget,
    *,
    settings: Settings,
    pace: Pace,
    partial: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> Asked:
    """Ask what is not answered yet; every reply is in the store before its worker asks on.

    Args:
        requests: with different keys.
        partial: go on where single questions are refused.
        say: called with a sentence for the person who waits.

    Raises:
        InputError: of the store.
    """
    asking = _Asking(requests, endpoint, store, budget, settings, pace, partial, progress, say)
    began = time.monotonic()
    with asking.stopping_on_signals():
        await asking.run()
    asking.outcome.seconds = time.monotonic() - began
    return asking.outcome


class _Stopped(Exception):
    """The run ends before this question could be asked."""


class _Asking:
    def __init__(
        self,
        requests: Sequence[Request],
        endpoint: Endpoint,
        store: Store,
        budget: Budget,
        settings: Settings,
        pace: Pace,
        partial: bool,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.outcome = Asked()
        self._waiting = deque(requests)
        self._total = len(requests)
        self._endpoint, self._store, self._budget = endpoint, store, budget
        self._settings, self._pace, self._partial = settings, pace, partial
        self._progress, self._say = progress, say
        self._stop = asyncio.Event()
        self._settled = asyncio.Condition()
        self._under_way = 0
        self._not_before = 0.0
        self._waits = 0
        self._began = time.monotonic()
        self._answered_at = 0.0
        self._workers: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        self._workers = workers = [
            asyncio.ensure_future(self._work()) for _ in range(min(self._pace.concurrency, self._total))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Ctrl-C ends the run when what is under way, and will be charged, has come in; a second one does at once."""
        loop = asyncio.get_running_loop()
        before: dict[signal.Signals, Any] = {}
        with suppress(NotImplementedError, ValueError, RuntimeError):  # Windows; not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                loop.add_signal_handler(number, self._interrupt)
                before[number] = handler
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _interrupt(self) -> None:
        if self.outcome.interrupted:
            for worker in self._workers:
                worker.cancel()
            return
        self.outcome.interrupted = True
        if self._under_way:
            self._say(f"Waiting for the {self._under_way} replies under way; Ctrl-C again ends at once.")
        self._end("interrupted")

    def _end(self, why: str) -> None:
        if self.outcome.stopped is None:
            self.outcome.stopped = why
        self._stop.set()

    async def _work(self) -> None:
        while self._waiting and not self._stop.is_set():
            request = self._waiting.popleft()
            try:
                await self._obtain(request)
            except (_Stopped, asyncio.CancelledError):
                if self.outcome.interrupted or self._stop.is_set():
                    return
                raise
            except Refused as refusal:
                where = f"prompt {request.id} ({request.shown[0]}, then {request.shown[1]})"
                self.outcome.refused[request.key] = f"{where}: {refusal}"
                nothing_yet = not self.outcome.answered and len(self.outcome.refused) >= self._pace.concurrency
                if not self._partial or nothing_yet:
                    self._end(f"Of {where}: {refusal}")
            except Fatal as fault:
                self._end(str(fault))

    async def _obtain(self, request: Request) -> None:
        """Ask until there is an answer.

        Raises:
            Refused, Fatal: there will be none. _Stopped: the run ends.
        """
        failing_since: float | None = None
        tries = 0
        while True:
            most = (most_prompt_tokens(request.prompt_bytes), self._settings.max_tokens)
            await self._until_allowed()
            cost = await self._reserve(*most)
            try:
                await self._ask_once(request, most, cost)
                return
            except Transient as failure:
                tries += 1
                self.outcome.retries += 1
                now = time.monotonic()
                failing_since = now if failing_since is None else failing_since
                wait = self._wait(failure, tries)
                unseen = not failure.arrived and not self.outcome.answered
                hopeless = now - failing_since + wait > self._pace.patience_s
                if hopeless or (unseen and tries >= FIRST_CONTACT_TRIES):
                    asked = (
                        "" if failure.retry_after_s is None else f" and asks to wait {duration(failure.retry_after_s)}"
                    )
                    why = f"{failure}{asked}; tried {tries} times in {duration(now - failing_since)}"
                    if self._partial and self._answered_at > failing_since:  # it is this question's own trouble
                        raise Refused(why) from failure
                    self._end(why)
                    raise _Stopped from failure
                await self._sleep(wait, str(failure))

    async def _ask_once(self, request: Request, most: tuple[int, int], cost: float) -> None:
        """Raises: Transient, Refused, Fatal."""
        number = self._store.send(request.key, *most)
        self._under_way += 1
        uncertain = True  # until it is known to have cost nothing; a cancelled question may have cost something
        try:
            reply = await self._endpoint.ask(request.messages, key=request.key, most=most)
            self._store.keep(number, request.key, self._settings.judge, reply)
            uncertain = False
            self._count(reply, most)
        except Transient as failure:
            uncertain = failure.maybe_paid
            raise
        except (Refused, Fatal):
            uncertain = False
            raise
        finally:
            self._under_way -= 1
            self._budget.reserved -= cost
            if uncertain:
                self._budget.uncertain += cost
            else:
                self._store.strike(number)
            async with self._settled:
                self._settled.notify_all()

    def _count(self, reply: Reply, most: tuple[int, int]) -> None:
        self.outcome.answered += 1
        self._answered_at = time.monotonic()
        self._budget.count(reply, most[0])
        self._show()

    async def _reserve(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Put aside the most that a question can cost; where that passes the cap, wait for what is under way.

        Raises:
            _Stopped: the cap is reached.
        """
        async with self._settled:
            while True:
                if self._stop.is_set():
                    raise _Stopped
                cost = self._budget.most(prompt_tokens, completion_tokens)
                if self._budget.affords(cost):
                    self._budget.reserved += cost
                    return cost
                if not self._under_way:
                    self.outcome.capped = True
                    self._end("capped")
                    raise _Stopped
                await self._settled.wait()

    def _wait(self, failure: Transient, tries: int) -> float:
        """Seconds until the next try: what the server asks for, or twice the last wait, less a random part."""
        if failure.retry_after_s is not None:
            wait = max(failure.retry_after_s, self._pace.backoff_s)  # "at once" would be an endless rush
            self._not_before = max(self._not_before, time.monotonic() + wait)  # it is meant for all of us
            return wait
        longest: float = self._pace.backoff_s * min(2.0 ** min(tries - 1, 30), LONGEST_BACKOFF)
        return longest * random.uniform(0.5, 1.0)

    async def _until_allowed(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            await self._sleep(left, "")

    async def _sleep(self, seconds: float, why: str) -> None:
        """Raises: _Stopped."""
        self._waits += 1
        if why:
            self._show(why)
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except asyncio.TimeoutError:
            return
        finally:
            self._waits -= 1
        raise _Stopped

    def _show(self, trouble: str = "") -> None:
        done, seconds = self.outcome.answered, max(time.monotonic() - self._began, 1e-9)
        parts = ["judging", f"{done / seconds:,.1f}/s"]
        if self._budget.prices.known:
            parts.append(f"cost {self._budget.committed:,.2f}")
        if self._waits:
            parts.append(f"{self._waits} waiting")
        if trouble:
            parts.append(trouble[:60])
        self._progress(", ".join(parts), done, self._total)
