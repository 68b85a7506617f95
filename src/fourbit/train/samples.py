"""What the model answers, before and after: a few questions from the held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fourbit.generate import Prompt, Sampling, generate
from fourbit.nn.loss import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sample", "answer", "choose"]


@dataclass(frozen=True)
class Sample:
    """One question and its answers.

    Attributes:
        prompt_ids: what the model is given.
        question: the same as text.
        expected: the answer in the data.
        before, after: the model's.
    """

    prompt_ids: list[int]
    question: str
    expected: str
    before: str | None = None
    after: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def choose(data: Dataset, tokenizer: PreTrainedTokenizerBase, *, count: int, longest: int) -> list[Sample]:
    """Examples spread over the data, each cut where its last answer begins.

    Args:
        data: with input_ids and labels.
        longest: tokens of a prompt; examples with more are passed over.
    """
    chosen: list[Sample] = []
    stride = max(1, len(data) // max(1, count))
    order = [*range(0, len(data), stride), *range(len(data))]
    for row in dict.fromkeys(order[: 20 * count + count]):
        if len(chosen) == count:
            break
        sample = _sample(data[row]["input_ids"], data[row]["labels"], tokenizer)
        if sample is not None and len(sample.prompt_ids) <= longest:
            chosen.append(sample)
    return chosen


def _sample(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Sample | None:
    carries_loss = [label != IGNORE for label in labels]
    starts = [i for i in range(1, len(ids)) if carries_loss[i] and not carries_loss[i - 1]]
    # Where every token counts, let it go on from the middle.
    start = starts[-1] if starts and not carries_loss[0] else len(ids) // 2
    stop = next((i for i in range(start, len(ids)) if not carries_loss[i]), len(ids))
    if start == 0 or stop <= start:
        return None
    question, expected = (_text(part, tokenizer) for part in (ids[:start], ids[start:stop]))
    question = _without_template(question, tokenizer)
    return Sample(list(ids[:start]), question, expected) if question and expected else None


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _without_template(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A question as a person wrote it, without what the template puts around it, where that is known."""
    mark = "\ue000"
    rendered = str(
        tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
    )
    for token in sorted({str(token) for token in tokenizer.all_special_tokens}, key=len, reverse=True):
        rendered = rendered.replace(token, "")
    before, _, after = rendered.partition(mark)
    return question.removeprefix(before.strip()).removesuffix(after.strip()).strip() or question


def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    field: str,
    longest: int,
) -> list[Sample]:
    """The samples with the likeliest answers of the model in the `field` "before" or "after".

    Args:
        longest: tokens of an answer.
    """
    prompts = [Prompt("", tuple(sample.prompt_ids), chat=True) for sample in samples]
    with torch.random.fork_rng():
        answers = generate(model, tokenizer, prompts, settings=Sampling(max_new_tokens=longest), batch_size=1)
    texts = [answer.text for answer in answers]
    if field == "before":
        return [replace(sample, before=text) for sample, text in zip(samples, texts, strict=True)]
    return [replace(sample, after=text) for sample, text in zip(samples, texts, strict=True)]
