"""A file of prompts to be made into a file of answers."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fourbit.errors import InputError
from fourbit.generate.answer_file import AnswerFile
from fourbit.generate.answers import TOO_LONG, Answer, generate_batches
from fourbit.generate.conversation import Prompt, render
from fourbit.generate.loading import Loaded, Origin
from fourbit.generate.prompts import Asked, read_prompts
from fourbit.generate.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Job", "Made"]


class Made(NamedTuple):
    """What a run of a job has made: answers, their tokens, and the seconds it took."""

    answers: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """What is to be done, checked as far as it can be without the weights.

    Attributes:
        origin: of the model.
        asked: the records.
        prompts: their first turns, as the model sees them.
        file: where answers go, and which are there already.
        settings, batch_size: see `generate`.
        too_long: how many prompts leave no room in the model's context.
        sentences: what a person should know.
    """

    origin: Origin
    asked: tuple[Asked, ...]
    prompts: tuple[Prompt, ...]
    file: AnswerFile
    settings: Sampling
    batch_size: int
    too_long: int
    sentences: tuple[str, ...]

    @classmethod
    def plan(
        cls,
        origin: Origin,
        prompts: str | os.PathLike[str],
        output: Path,
        *,
        settings: Sampling,
        batch_size: int = 8,
        mode: str = "auto",
        system: str | None = None,
        overwrite: bool = False,
    ) -> Job:
        """Read and render the prompts, and look at what is in the output; nothing is written.

        Args:
            prompts, mode, system: see `read_prompts`.
            output, overwrite: see `AnswerFile`.

        Raises:
            InputError: the batch size is below 1, a record is broken or does not fit the template (names the line), or
            all prompts are too long. OutputExists: see `AnswerFile`. What `Origin.load_tokenizer` raises.
        """
        if batch_size < 1:
            raise InputError(f"The batch size is {batch_size}; it must be at least 1.")
        asked = tuple(read_prompts(prompts, mode=mode, system=system))
        tokenizer, sentences = origin.load_tokenizer()
        rendered = tuple(_render(tokenizer, each) for each in asked)
        too_long, about_them = _find_too_long(asked, rendered, origin.context_length())
        template = hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=16).hexdigest()
        identity = {
            **origin.fingerprints(),
            "chat_template": template,
            "mode": mode,
            "system": system,
            "dtype": origin.compute_dtype,
            **{name: getattr(origin, name) for name in ("format", "block_size", "double_quant")},
            **asdict(settings),
        }
        file = AnswerFile(output, asked, identity, overwrite=overwrite)
        return cls(origin, asked, rendered, file, settings, batch_size, too_long, (*sentences, *about_them))

    def load(self) -> Loaded | None:
        """The model, for `run`; None where no answer is missing.

        Raises:
            see `Origin.load`.
        """
        return self.origin.load() if len(self.file.done) < len(self.prompts) else None

    def run(self, loaded: Loaded | None, *, progress: Callable[[int, int, float], None] | None = None) -> Made:
        """Make the answers that are missing.

        Args:
            loaded: see `load`.
            progress: called with the prompts answered, those in all, and the tokens per second, after each batch.

        Raises:
            what `generate` raises; nothing is written before the first answers are there. OutputExists: another
            process writes the file.
        """
        done = self.file.done
        batches: Iterator[dict[int, list[Answer]]] = iter(())
        if loaded is not None:
            batches = self._conversations(loaded, done)
        answers, tokens, started = 0, 0, time.perf_counter()
        first = next(batches, {})  # before the file is touched, as the model may be at fault
        with self.file:
            for batch in chain([first], batches):
                self.file.append(batch)
                answers += len(batch)
                tokens += sum(answer.tokens for turns in batch.values() for answer in turns)
                if progress is not None:
                    progress(len(done) + answers, len(self.prompts), tokens / (time.perf_counter() - started))
            self.file.finish()
        return Made(answers, tokens, time.perf_counter() - started)

    def _conversations(self, loaded: Loaded, done: Collection[int]) -> Iterator[dict[int, list[Answer]]]:
        """Batches of answers, those to the later turns of a conversation included."""
        for batch in self._batches(loaded, self.prompts, done):
            said = {index: [answer] for index, answer in batch.items()}
            while waiting := [index for index, turns in said.items() if self._goes_on(index, turns)]:
                prompts = [self._next_turn(loaded.tokenizer, index, said[index]) for index in waiting]
                for answers in self._batches(loaded, prompts, ()):
                    for place, answer in answers.items():
                        said[waiting[place]].append(answer)
            yield said

    def _batches(self, loaded: Loaded, prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[dict[int, Answer]]:
        return generate_batches(
            loaded.model,
            loaded.tokenizer,
            prompts,
            settings=self.settings,
            batch_size=self.batch_size,
            done=done,
        )

    def _goes_on(self, index: int, turns: Sequence[Answer]) -> bool:
        """Whether the user has more to say; not to an answer for which there was no room."""
        return len(turns) <= len(self.asked[index].later) and turns[-1].finish_reason != TOO_LONG

    def _next_turn(self, tokenizer: PreTrainedTokenizerBase, index: int, turns: Sequence[Answer]) -> Prompt:
        asked = self.asked[index]
        messages = [*(message for message in asked.asked if isinstance(message, Mapping))]
        for answer, reply in zip(turns, asked.later, strict=False):
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": reply}]
        return _render(tokenizer, replace(asked, id=f"{asked.id}, turn {len(turns) + 1}", asked=messages))


def _render(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> Prompt:
    try:
        return render(tokenizer, asked.asked, key=str(asked.id))
    except InputError as error:
        raise InputError(f"{asked.where}: {error}") from error


def _find_too_long(
    asked: Sequence[Asked], prompts: Sequence[Prompt], context: int | None
) -> tuple[int, tuple[str, ...]]:
    """How many prompts leave no room in the context, and what to say about it.

    Raises:
        InputError: all of them.
    """
    if context is None:
        return 0, ()
    found = [index for index, prompt in enumerate(prompts) if len(prompt.ids) >= context]
    if not found:
        return 0, ()
    example = f"{asked[found[0]].where}: the prompt has {len(prompts[found[0]].ids):,} tokens, and the model sees"
    example = f"{example} {context:,} at most."
    if len(found) == len(prompts):
        raise InputError(f"{example} No prompt is shorter." if len(found) > 1 else example)
    few = f"{len(found)} of {len(prompts)} prompts are too long and get an empty answer, such as {example}"
    return len(found), (few,)
