"""Answers of a model: for many prompts in batches, or for one as a stream.

Prompts of about the same length share a batch, padded on the left. An answer does not depend on what else is in its
batch: each row ends by itself, is never longer than alone, and is drawn by a generator of its own. What is left is
rounding, which a product of several rows does in another order than a product of one: in fp32 that moves no token in
practice, in bf16 it does where two tokens are about equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fourbit.errors import InputError
from fourbit.generate.conversation import Message, Prompt, render
from fourbit.generate.decode import decode
from fourbit.generate.endings import find_endings
from fourbit.generate.growing import Growing
from fourbit.generate.sampling import Sampling
from fourbit.models.out_of_memory import Halving

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TOO_LONG", "Answer", "context_length", "generate", "generate_batches", "stream"]

TOO_LONG = "prompt_too_long"


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: the answer; an assistant's turn without the white space around it.
        ids: its tokens, with the one that ended it.
        finish_reason: "stop" (the end of the turn or text, or a stop string), "length" (`max_new_tokens`, or the end of
            the model's context), or "prompt_too_long" (the prompt leaves no room in the context; the text is empty).
    """

    text: str
    ids: tuple[int, ...] = field(repr=False)
    finish_reason: str

    @property
    def tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.ids)


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | str | Sequence[Message]],
    *,
    settings: Sampling | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answer prompts.

    Args:
        model: a causal language model of transformers, quantized or not, with an adapter or not; left as it was found,
            in training or not.
        tokenizer: the one it was trained with, with a chat template where there are conversations.
        prompts: conversations to answer, texts to continue, or either as rendered before.
        settings: greedy by default.
        batch_size: prompts at a time.
        progress: called with how many are answered and how many there are, after each batch.

    Returns:
        one answer per prompt, in their order.

    Raises:
        InputError: the model cannot generate or its scores are not numbers, the tokenizer is another model's, the
        template refuses a conversation, or the batch size is below 1.
    """
    rendered = [
        prompt if isinstance(prompt, Prompt) else render(tokenizer, prompt, key=str(index))
        for index, prompt in enumerate(prompts)
    ]
    answers: dict[int, Answer] = {}
    for batch in generate_batches(model, tokenizer, rendered, settings=settings, batch_size=batch_size):
        answers.update(batch)
        if progress is not None:
            progress(len(answers), len(rendered))
    return [answers[index] for index in range(len(rendered))]


def generate_batches(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    settings: Sampling | None = None,
    batch_size: int = 8,
    done: Collection[int] = (),
) -> Iterator[dict[int, Answer]]:
    """The same, batch by batch, longest prompts first.

    A batch that does not fit into memory is made in halves, and so are all that follow: an answer does not depend on
    what else is in its batch.

    Args:
        done: indices that need no answer. A batch with others in it is still made whole, so that what was interrupted
            goes on with the very same batches; only the others are returned.

    Yields:
        answers by the index of their prompt.

    Raises:
        InputError: see `generate`; also when one prompt alone does not fit into memory.
    """
    settings = settings or Sampling()
    if batch_size < 1:
        raise InputError(f"The batch size is {batch_size}; it must be at least 1.")
    _check_model(model)
    _check_ids(model, prompts)
    rooms = [_room(model, prompt, settings) for prompt in prompts]
    if unanswerable := {index: Answer("", (), TOO_LONG) for index, room in enumerate(rooms) if room < 1}:
        yield {index: answer for index, answer in unanswerable.items() if index not in done}
    endings = {
        chat: find_endings(model, tokenizer, settings=settings, chat=chat) for chat in {each.chat for each in prompts}
    }

    def whole_answers(batch: Sequence[int]) -> list[Answer]:
        rows = [
            Growing(
                tokenizer,
                prompts[index],
                endings=endings[prompts[index].chat],
                limit=min(rooms[index], settings.max_new_tokens),
            )
            for index in batch
        ]
        for _ in _run(model, tokenizer, [prompts[index] for index in batch], rows, settings):
            pass
        return [_answer(row) for row in rows]

    smaller = Halving("prompts", hint="shorten it, or lower `max_new_tokens`")
    for batch in _plan(prompts, rooms, settings.max_new_tokens, batch_size):
        wanted = [index for index in batch if index not in done]
        if not wanted:
            continue
        finished = {
            index: answer
            for part, answers in smaller.run(batch, whole_answers)
            for index, answer in zip(part, answers, strict=True)
        }
        yield {index: finished[index] for index in wanted}


def stream(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | str | Sequence[Message],
    *,
    settings: Sampling | None = None,
) -> Generator[str | Answer, None, None]:
    """Answer one prompt, piece by piece as it is made.

    Closing the iterator ends the answer after the token that is being made.

    Args:
        model, tokenizer, prompt, settings: see `generate`.

    Yields:
        pieces of text that join to the answer's text, then the `Answer`.

    Raises:
        InputError: see `generate`; also when the prompt leaves no room in the model's context.
    """
    settings = settings or Sampling()
    if not isinstance(prompt, Prompt):
        prompt = render(tokenizer, prompt, key="0")
    _check_model(model)
    _check_ids(model, [prompt])
    room = _room(model, prompt, settings)
    if room < 1:
        raise InputError(
            f"The prompt has {len(prompt.ids):,} tokens, and this model sees {context_length(model.config):,} at most;"
            " shorten it."
        )
    endings = find_endings(model, tokenizer, settings=settings, chat=prompt.chat)
    row = Growing(tokenizer, prompt, endings=endings, limit=min(room, settings.max_new_tokens))
    told = 0
    for _ in _run(model, tokenizer, [prompt], [row], settings):
        settled = row.settled
        if len(settled) > told:
            yield settled[told:]
            told = len(settled)
    yield _answer(row)


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model with this configuration was made for; None where it has no bound."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    rows: Sequence[Growing],
    settings: Sampling,
) -> Iterator[None]:
    """Feed the rows with their tokens until each has come to its end, and stop after every token."""
    made = decode(
        model,
        [prompt.ids for prompt in prompts],
        settings=settings,
        keys=[prompt.key for prompt in prompts],
        most=max(row.limit for row in rows),
        tokenizer=tokenizer,
    )
    with closing(made):
        for tokens in made:
            for row, token in zip(rows, tokens, strict=True):
                if row.finish_reason is None:
                    row.push(token)
            yield
            if all(row.finish_reason is not None for row in rows):
                return


def _answer(row: Growing) -> Answer:
    return Answer(row.text, tuple(row.ids), row.finish_reason or "stop")


def _room(model: Any, prompt: Prompt, settings: Sampling) -> int:
    """How many tokens can follow a prompt."""
    longest = context_length(model.config)
    return settings.max_new_tokens if longest is None else longest - len(prompt.ids)


def _plan(prompts: Sequence[Prompt], rooms: Sequence[int], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Which prompts share a batch: the longest first, which tells early whether the memory is enough.

    One that comes to the end of the context before `max_new_tokens` is alone: in company it would be kept running, past
    the last position that the model knows.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].ids), index))
    answerable = [index for index in order if rooms[index] >= 1]
    yield from ([index] for index in answerable if rooms[index] < max_new_tokens)
    free = [index for index in answerable if rooms[index] >= max_new_tokens]
    yield from (free[start : start + batch_size] for start in range(0, len(free), batch_size))


def _check_model(model: Any) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not inner.can_generate() or inner.config.is_encoder_decoder:
        raise InputError(f"A {type(inner).__name__} does not continue text; give a causal language model.")


def _check_ids(model: Any, prompts: Sequence[Prompt]) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((max(prompt.ids) for prompt in prompts), default=0)
    if largest >= rows:
        raise InputError(
            f"The tokenizer gives token {largest}, and the model knows {rows} tokens: it is another model's tokenizer."
        )
