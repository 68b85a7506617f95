"""The loop that makes tokens: the prompts once, then one token of every row at a time.

transformers prepares everything (positions, masks, processors of scores, the model's own settings) and hands over to
this loop by its `custom_generate`, so that what comes out is what its own greedy loop gives. Ours differs in what a
token costs: keys and values lie in memory that was allocated once (`generate.cache`), and a step runs in the leanest
way there is for the model,

    captured    on a GPU, a CUDA graph of the whole step (`generate.graph`): the host only asks for the next one, and
                reads tokens once every few steps
    walk        on a CPU, for models of LLaMA's build, the kernels one after the other (`generate.walk`)
    plain       else, the model's own forward pass

and falls back to the last one with a sentence in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from fourbit.generate.cache import make_cache
from fourbit.generate.graph import FEWEST, Captured, room_for
from fourbit.generate.proof import proven
from fourbit.generate.sampling import NextToken, Sampling
from fourbit.generate.walk import Walk
from fourbit.models.mode import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["READ_EVERY", "decode"]

_LOG = logging.getLogger("fourbit")

READ_EVERY = 8
"""Tokens that a GPU makes before the host looks at them. Those made after the end of an answer are wasted."""


_ROUNDING = 16
"""How far the logits of a captured step may lie from those of a plain one, in roundings of the largest: a step that
is another one, with a wrong position or mask, misses by hundreds."""


Step = Callable[[Tensor], Tensor]
"""One step of decoding: [B, T] tokens, of which all but the last have been seen before, to the logits [B, V] of the
next."""


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    settings: Sampling,
    keys: Sequence[str],
    most: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Generator[list[int], None, None]:
    """Continue prompts; close the iterator when no row needs more.

    Args:
        model: of transformers, with an adapter of peft or not; in evaluation while this runs, and then as it was.
        prompts: token ids, none empty.
        settings: how a token is chosen.
        keys: what each row's draw is seeded with.
        most: tokens to make at most.
        tokenizer: needed where the model's own settings have stop strings.

    Yields:
        a token for each row, `most` times; also for rows that have ended, whose tokens mean nothing.

    Raises:
        InputError: the model's scores are not numbers.
    """
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)  # any token will do: the mask hides it
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = model.get_input_embeddings().weight.device
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    captures = _captures(device)
    cache = make_cache(inner, room_for(width + most) if captures else width + most, whole=captures)
    if cache is None:
        _LOG.info("%s keeps more than keys and values; transformers' own cache is used.", type(inner).__name__)
    with evaluating(model):
        yield from model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=_generation_config(most),
            logits_processor=LogitsProcessorList([NextToken(settings, keys)]),
            tokenizer=tokenizer,
            custom_generate=_loop,
            **({} if cache is None else {"past_key_values": cache}),
        )


def _generation_config(most: int) -> GenerationConfig:
    """Greedy, as `NextToken` draws; what is not set (a penalty for repetition, say) is taken from the model's own."""
    return GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,  # a prepared model has it turned off in its config
        pad_token_id=0,  # for rows that have ended: nobody reads it
        return_dict_in_generate=False,
    )


def _loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: object,
    generation_config: GenerationConfig,
    tokenizer: object = None,
    synced_gpus: object = None,
    **inputs: Any,
) -> Iterator[list[int]]:
    """What `custom_generate` asks for: all that transformers prepared, to tokens. When to stop is the caller's."""
    rows, width = input_ids.shape
    most: int = generation_config.max_length - width
    text = torch.cat((input_ids, input_ids.new_zeros((rows, most))), dim=1)
    choose = next(each for each in logits_processor if isinstance(each, NextToken))
    every = READ_EVERY if text.device.type == "cuda" else 1
    step: Step | None = None
    read = width
    for end in range(width, width + most):
        with torch.no_grad():
            if step is None:
                outputs = model(
                    **model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs),
                    return_dict=True,
                )
                logits = outputs.logits[:, -1]
                step = _choose_step(model, outputs, inputs, most)
                del outputs
            else:
                logits = step(text[:, :end])
            # A copy also of fp32: processors may write into it.
            scores = logits.to(torch.float32, copy=True)
            for process in logits_processor:  # the list itself asks for the signature of each, every time
                scores = process(text[:, :end], scores)
            text[:, end] = scores.argmax(dim=-1)
        if (end - width) % every == 0 or end + 1 == width + most:
            new = text[:, read : end + 1].t().tolist()
            choose.check()
            read = end + 1
            yield from new


def _choose_step(model: Any, outputs: Any, inputs: dict[str, Any], most: int) -> Step:
    """The leanest step that takes this model as it is now, after its prompts."""
    plain = _Plain(model, outputs, inputs)
    cache = inputs.get("past_key_values")
    captures = _captures(plain.device)
    if cache is None or most < (FEWEST if captures else 2):
        return plain
    try:
        if captures:
            captured = Captured(model, cache, inputs)
            captured.capture()
            # Attention over a masked cache is another kernel than over the tokens there are.
            return proven(model, captured, plain, tolerance=_ROUNDING)
        if plain.device.type == "cpu":
            return proven(model, Walk(model, cache, inputs), plain, tolerance=0)
    except Exception as reason:  # another library's model, of a build that we do not know: any failure is an answer
        level = logging.WARNING if captures else logging.INFO  # on a GPU it is several times slower
        _LOG.log(level, "decoding with the forward pass of %s itself: %s", type(model).__name__, reason)
    return plain


def _captures(device: torch.device) -> bool:
    return device.type == "cuda"


class _Plain:
    """The model's own forward pass, with what transformers prepares for every token."""

    def __init__(self, model: Any, outputs: Any, inputs: dict[str, Any]) -> None:
        self._model = model
        self.device: torch.device = outputs.logits.device
        self._go_on(outputs, inputs)

    def __call__(self, text: Tensor) -> Tensor:
        prepared = self._model.prepare_inputs_for_generation(text, next_sequence_length=1, **self._inputs)
        outputs = self._model(**prepared, return_dict=True)
        self._go_on(outputs, self._inputs)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _go_on(self, outputs: Any, inputs: dict[str, Any]) -> None:
        self._inputs = self._model._update_model_kwargs_for_generation(outputs, dict(inputs), is_encoder_decoder=False)
