"""A file of prompts to be made into a file of answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fourbit.errors import InputError
from fourbit.generate.answer_file import AnswerFile
from fourbit.generate.answers import Answer, generate_batches
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
        prompts: as the model sees them.
        file: where answers go, and which are there already.
        settings, batch_size: see `generate`.
        too_long: how many prompts leave no room in the model's context.
        sentences: what a person should know.
    """

    origin: Origin
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
        prompts: Path,
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
        asked = read_prompts(prompts, mode=mode, system=system)
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
        return cls(origin, rendered, file, settings, batch_size, too_long, (*sentences, *about_them))

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
        batches: Iterator[dict[int, Answer]] = iter(())
        if loaded is not None:
            batches = generate_batches(
                loaded.model,
                loaded.tokenizer,
                self.prompts,
                settings=self.settings,
                batch_size=self.batch_size,
                done=done,
            )
        answers, tokens, started = 0, 0, time.perf_counter()
        first = next(batches, {})  # before the file is touched, as the model may be at fault
        with self.file:
            for batch in chain([first], batches):
                self.file.append(batch)
                answers, tokens = answers + len(batch), tokens + sum(answer.tokens for answer in batch.values())
                if progress is not None:
                    progress(len(done) + answers, len(self.prompts), tokens / (time.perf_counter() - started))
            self.file.finish()
        return Made(answers, tokens, time.perf_counter() - started)


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
