"""Where an answer ends: tokens of the model and the tokenizer, the end of a turn, the header of the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fourbit.data.templates import end_of_turn
from fourbit.generate.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Endings", "find_endings"]

_QUESTION, _ANSWER = "\ue000question\ue001", "\ue000answer\ue001"


@dataclass(frozen=True)
class Endings:
    """What ends an answer.

    Attributes:
        ids: tokens.
        stop: texts, which are no part of the answer.
    """

    ids: frozenset[int]
    stop: tuple[str, ...]


def find_endings(model: Any, tokenizer: PreTrainedTokenizerBase, *, settings: Sampling, chat: bool) -> Endings:
    """What ends an answer of this model.

    An assistant's turn also ends where the template would end it, and where a model that has not learned to end goes on
    with the user's next turn ("### Human:").

    Args:
        chat: whether it is an assistant's turn.
    """
    own = model.generation_config
    configured = own.eos_token_id if isinstance(own.eos_token_id, (list, tuple)) else [own.eos_token_id]
    ends: list[int | str] = [tokenizer.eos_token_id, *configured, *settings.stop, *(own.stop_strings or ())]
    if chat:
        ends += [*end_of_turn(tokenizer), _next_header(tokenizer)]
    return Endings(
        frozenset(end for end in ends if isinstance(end, int)),
        tuple(dict.fromkeys(end for end in ends if isinstance(end, str) and end)),
    )


def _next_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands in front of the user's second turn, where it is plain text; else ""."""
    from jinja2.exceptions import TemplateError

    messages = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _QUESTION},
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:  # a template for one turn alone
        return ""
    header = text.rpartition(_ANSWER)[2].partition(_QUESTION)[0]
    for token in (tokenizer.eos_token, tokenizer.bos_token):
        header = header.replace(str(token), "") if token else header
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # A special token is never decoded, and what would be left of the header ("user") can stand in any answer.
    return "" if any(token in header for token in added) else header.strip()
