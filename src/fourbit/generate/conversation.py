"""From what a person asks to the token ids that a model continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from fourbit.data.templates import Refused, render_turns
from fourbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Message", "Prompt", "render"]

Message: TypeAlias = Mapping[str, str]
"""A turn of a conversation: its `role` (system, user, assistant, or what the template knows) and its `content`."""


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
        text: as the model sees it, with the template around every turn.
        ids: the same as token ids; what the tokenizer puts in front is among them.
        chat: whether an assistant's turn is asked for, which ends where the turn ends.
        key: what the draw of a sampled answer is seeded with, besides the run's seed.
    """

    text: str
    ids: tuple[int, ...] = field(repr=False)
    chat: bool
    key: str = ""


def render(tokenizer: PreTrainedTokenizerBase, asked: str | Sequence[Message], *, key: str = "") -> Prompt:
    """Render a conversation with the tokenizer's chat template, or take a text as it is, to be continued.

    Args:
        tokenizer: for a conversation it must have a chat template; see `load_for_generation`.
        asked: a text, or the turns of a conversation, of which the last is not the assistant's.
        key: see `Prompt`.

    Raises:
        InputError: the prompt is empty or malformed, or the template refuses the conversation.
    """
    if isinstance(asked, str):
        return _continued(tokenizer, _whole(asked), key)
    messages = [_checked(message) for message in asked]
    if not messages:
        raise InputError("The conversation is empty; it needs at least one message.")
    if messages[-1]["role"] == "assistant":
        raise InputError("The last message is the assistant's already; leave it out to have it answered anew.")
    text = _templated(tokenizer, messages)
    # The template writes BOS and the like itself.
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return Prompt(text, tuple(ids), chat=True, key=key)


def _continued(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> Prompt:
    ids = list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()  # some tokenizers end every text, and nothing would follow
    if not ids:
        raise InputError("The prompt is empty, and the tokenizer has no token to begin a text with.")
    return Prompt(text, tuple(ids), chat=False, key=key)


def _checked(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise InputError("A message of a conversation needs a role and a content, both text.")
    _whole(message["content"])
    return dict(message)


def _whole(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # no tokenizer takes it
        raise InputError("The prompt holds half of a surrogate pair, which is not text; is it UTF-8?")
    return text


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    if not tokenizer.chat_template:
        raise InputError("The tokenizer has no chat template, so it cannot render a conversation.")
    try:
        text, _ = render_turns(tokenizer, messages, add_generation_prompt=True)
    except Refused as error:
        raise InputError(f"The chat template refuses this conversation: {error}.") from error
    return text
