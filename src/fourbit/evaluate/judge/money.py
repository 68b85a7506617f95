"""What judging costs: an estimate before, a cap that is never passed meanwhile, and the sum after.

The estimate takes BYTES_PER_TOKEN bytes of English for a token, and TYPICAL_TOKENS for a reply. The cap takes the most
that is possible: a tokenizer that knows all bytes makes no more tokens than bytes, and a server that obeys writes no
more than it is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fourbit.errors import InputError
from fourbit.evaluate.judge.store import Reply

__all__ = ["Budget", "Estimate", "Prices", "estimate", "most_prompt_tokens"]

BYTES_PER_TOKEN = 4.0
TYPICAL_TOKENS = 200
TYPICAL_SECONDS = 6.0
FRAME_TOKENS = 64
"""What a chat template may put around the messages."""


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens, of the prompt and of the reply, in any currency; None: not known."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--price-in", self.prompt), ("--price-out", self.completion)):
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}; it must be 0 or more for a million tokens.")
        if (self.prompt is None) != (self.completion is None):
            raise InputError("Give both prices, --price-in and --price-out, or neither.")

    @property
    def known(self) -> bool:
        return self.prompt is not None

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """In the prices' currency; 0 where they are not known."""
        if self.prompt is None or self.completion is None:
            return 0.0
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def most_prompt_tokens(prompt_bytes: int) -> int:
    """The most tokens that messages of so many bytes can be."""
    return prompt_bytes + FRAME_TOKENS


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, in tokens, money and seconds; `most_*` is what it can come to."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    cost: float | None
    most_cost: float | None
    seconds: float


def estimate(
    prompt_bytes: Sequence[int], known: Sequence[Reply], *, prices: Prices, max_tokens: int, concurrency: int
) -> Estimate:
    """What questions of these sizes will cost.

    Args:
        prompt_bytes: of each question.
        known: replies of the same judge to the same kind of question, from which tokens and seconds are taken; without
            any, the constants of this module.
    """
    count = len(prompt_bytes)
    tokens = min(sum(reply.completion_tokens for reply in known) / len(known) if known else TYPICAL_TOKENS, max_tokens)
    seconds = sum(reply.seconds for reply in known) / len(known) if known else TYPICAL_SECONDS
    prompt = round(sum(prompt_bytes) / BYTES_PER_TOKEN)
    return Estimate(
        requests=count,
        prompt_tokens=prompt,
        completion_tokens=round(tokens * count),
        most_completion_tokens=max_tokens * count,
        cost=prices.cost(prompt, tokens * count) if prices.known else None,
        most_cost=prices.cost(prompt, max_tokens * count) if prices.known else None,
        seconds=seconds * count / min(concurrency, max(count, 1)),
    )


@dataclass
class Budget:
    """The money that was spent, may have been spent, and may be under way.

    Attributes:
        prices: see `Prices`.
        cap: None: no cap.
        spent: for replies that came.
        uncertain: at the most, for questions whose reply never came.
        reserved: at the most, for questions under way.
        prompt_tokens, completion_tokens: of the replies.
    """

    prices: Prices
    cap: float | None = None
    spent: float = 0.0
    uncertain: float = 0.0
    reserved: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _excess: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if self.cap is None:
            return
        if not self.cap >= 0:
            raise InputError(f"--max-cost is {self.cap}; it must be 0 or more.")
        if not self.prices.known:
            raise InputError("A cap on spending needs prices; give --price-in and --price-out for a million tokens.")

    @property
    def committed(self) -> float:
        """What was spent, at the most."""
        return self.spent + self.uncertain

    def most(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The most that a question can cost; a server that counts more for its frame is taken at its word."""
        return self.prices.cost(prompt_tokens + self._excess, completion_tokens)

    def affords(self, cost: float) -> bool:
        return self.cap is None or self.committed + self.reserved + cost <= self.cap

    def count(self, reply: Reply, most_prompt_tokens: int) -> None:
        """A reply came."""
        self._excess = max(self._excess, reply.prompt_tokens - most_prompt_tokens)
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.spent += self.prices.cost(reply.prompt_tokens, reply.completion_tokens)
