"""A conversation that goes on: its history, and what of it still fits into the model's context."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from fourbit.errors import InputError
from fourbit.generate.answers import Answer, context_length, stream
from fourbit.generate.conversation import Prompt, render
from fourbit.generate.loading import Loaded
from fourbit.generate.sampling import Sampling

__all__ = ["Session"]

_ROOM_SHARE = 4
"""At least this part of the context (1/4) is kept free for an answer, if it may be as long."""


class Session:
    """A conversation with a model.

    Attributes:
        system: what the system says at its beginning, or None.
        turns: of the user and the assistant, alternating, the oldest first.
        forgotten: how many of the oldest turns the model did not see when it last answered, for want of room.
        tokens: generated so far.
    """

    def __init__(self, loaded: Loaded, *, settings: Sampling, system: str | None = None) -> None:
        self.system, self.turns, self.forgotten, self.tokens = system, list[dict[str, str]](), 0, 0
        self._loaded, self._settings = loaded, settings
        self._asked = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation."""
        return [*self._opening(), *self.turns]

    def ask(self, said: str) -> Generator[str, None, None]:
        """Say something, and get the answer in pieces.

        What has been answered when the iterator is closed stays in the history; where that is nothing, the question
        does not stay either.

        Raises:
            InputError: the template refuses the conversation, or what is said is too long for the model. It is not
            kept.
        """
        self.turns.append({"role": "user", "content": said})
        answered = ""
        try:
            prompt = self._prompt()
            with closing(stream(self._loaded.model, self._loaded.tokenizer, prompt, settings=self._settings)) as pieces:
                for piece in pieces:
                    if isinstance(piece, Answer):
                        self.tokens += piece.tokens
                    else:
                        answered += piece
                        yield piece
        finally:
            if answered:
                self.turns.append({"role": "assistant", "content": answered})
            else:
                self.turns.pop()

    def take_back(self) -> str | None:
        """Remove the last question and its answer; returns the question, or None if there is none."""
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return question

    def reset(self) -> None:
        """Forget everything but what the system says."""
        self.turns.clear()
        self.forgotten = 0

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _prompt(self) -> Prompt:
        """The conversation as the model sees it, without as many of the oldest turns as it takes to make room."""
        self._asked += 1  # so that the same question, asked again, is not answered by the same draw
        context = context_length(self._loaded.model.config)
        for start in range(0, len(self.turns), 2):
            messages = [*self._opening(), *self.turns[start:]]
            prompt = render(self._loaded.tokenizer, messages, key=str(self._asked))
            room = None if context is None else context - len(prompt.ids)
            if room is None or room >= min(self._settings.max_new_tokens, (context or 0) // _ROOM_SHARE):
                break
        self.forgotten = start
        if room is not None and room < 1:
            raise InputError(
                f"That is too long: with the template around it {len(prompt.ids):,} tokens, and the model sees"
                f" {context:,} at most."
            )
        return prompt
