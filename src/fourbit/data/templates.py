"""Chat templates: the tokenizer's own, or one of ours for a base model that has none.

A template of ours is plain text that every vocabulary can spell, and ends an assistant's turn with the tokenizer's EOS:
no row is added to an embedding, so nothing new has to be learned, saved or merged. What the model is asked with stops
right behind "Assistant:", without the space that most vocabularies join to the next word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fourbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT",
    "TEMPLATES",
    "Refused",
    "Turn",
    "closing",
    "end_of_turn",
    "ensure_chat_template",
    "ensure_pad_token",
    "inner_closing",
    "lead",
    "left_out",
    "render_turns",
]

DEFAULT = "guanaco"

Turn: TypeAlias = Mapping[str, Any]
"""A message as a template takes it: role, content, and what an assistant or a tool may have besides."""


class Refused(ValueError):
    """The chat template cannot render a conversation, or changes what is in it; the text says why."""


def _plain_turns(user: str, assistant: str, between: str, *, system: str = "{{ text }}") -> str:
    """A template of plain-text headers, with EOS behind every answer."""
    return (
        "{{ bos_token | default('') }}"
        "{% for message in messages %}{% set text = message['content'] | trim %}"
        "{% if not loop.first %}" + between + "{% endif %}"
        "{% if message['role'] == 'system' %}" + system + "{% elif message['role'] == 'user' %}" + user + "{{ text }}"
        "{% elif message['role'] == 'assistant' %}" + assistant + " {{ text }}{{ eos_token }}"
        "{% else %}{{ raise_exception('the role ' ~ message['role'] ~ ' is not known here') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + between + assistant + "{% endif %}"
    )


TEMPLATES = {
    "guanaco": _plain_turns("### Human: ", "### Assistant:", "{{ '\\n' }}"),
    "alpaca": _plain_turns("### Instruction:\n", "### Response:", "{{ '\\n\\n' }}"),
    "vicuna": _plain_turns("USER: ", "ASSISTANT:", "{{ '\\n' }}"),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token | default('') }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
        "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
"""Templates by name. guanaco, alpaca and vicuna suit every vocabulary; the others want their markers in it."""

NEEDS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> str | None:
    """Give a tokenizer a chat template, in place, where it has none or another is asked for.

    Args:
        tokenizer: is saved with the template, so that whoever loads it asks in the same form.
        name: one of `TEMPLATES`, or a Jinja file. None keeps the tokenizer's own; where it has none, it gets Guanaco's.

    Returns:
        what to tell the user, or None where nothing changed.

    Raises:
        InputError: the name is unknown, or the tokenizer lacks what the template needs.
    """
    if name is None:
        if tokenizer.chat_template:
            return None
        _need_eos(tokenizer)
        tokenizer.chat_template = TEMPLATES[DEFAULT]
        return "The tokenizer has no chat template; it gets Guanaco's (### Human: ... ### Assistant: ...)."
    template = TEMPLATES.get(name) or _from_file(name)
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in NEEDS.get(name, ()) if marker not in vocabulary]
    if missing:
        raise InputError(
            f"The chat template {name} needs {', '.join(missing)} in the vocabulary, and this tokenizer has not;"
            " guanaco, alpaca and vicuna suit every tokenizer."
        )
    if "eos_token" in template:
        _need_eos(tokenizer)
    if tokenizer.chat_template == template:
        return None
    tokenizer.chat_template = template
    return f"The chat template is {name}."


def _from_file(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise InputError(f"There is no chat template {name!r}; give {', '.join(TEMPLATES)}, or a Jinja file.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The chat template {name} cannot be read.") from error


def _need_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token is None:
        raise InputError(
            "The tokenizer has no EOS token, so no answer could ever end; name one in its tokenizer_config.json."
        )


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give a tokenizer a pad token, in place, without adding one to the vocabulary.

    Padding carries no loss by its position, not by its id, so that EOS, where it pads, is still learned.

    Returns:
        what to tell the user, or None where nothing changed.

    Raises:
        InputError: it has no token that could pad.
    """
    if tokenizer.pad_token is not None:
        return None
    token = tokenizer.unk_token or tokenizer.eos_token
    if token is None:
        raise InputError("The tokenizer has neither a pad nor an EOS token; name one in its tokenizer_config.json.")
    tokenizer.pad_token = token
    return f"The tokenizer has no pad token; {token} pads."


def render_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Turn],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[str, tuple[Turn, ...]]:
    """Render a conversation. Where the template knows no system turn, its words go in front of the user's first.

    Args:
        tools: the functions that the assistant may call.

    Returns:
        the text, and the turns that were rendered.

    Raises:
        Refused: the template cannot render the conversation.
    """
    turns = tuple(messages)
    folds = len(turns) > 1 and turns[0]["role"] == "system" and turns[1]["role"] == "user"
    try:
        text = _rendered(tokenizer, turns, add_generation_prompt=add_generation_prompt, tools=tools)
        if not folds or turns[0]["content"].strip() in text:  # some templates leave system turns out and say nothing
            return text, turns
    except Refused:
        if not folds:
            raise
    system, user, *others = turns
    turns = ({"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *others)
    return _rendered(tokenizer, turns, add_generation_prompt=add_generation_prompt, tools=tools), turns


_QUESTION, _ANSWER, _SECOND = "\ue000question\ue001", "\ue000answer\ue001", "\ue000second\ue001"
_ASKED = ({"role": "user", "content": _QUESTION},)
_ANSWERED = (*_ASKED, {"role": "assistant", "content": _ANSWER})


def lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template puts between what a model is asked with and the answer: mostly "", in some " ".

    Raises:
        InputError: the template cannot even render one question and its answer.
    """
    asked = _probed(tokenizer, _ASKED, add_generation_prompt=True)
    answered = _probed(tokenizer, _ANSWERED)
    return answered[len(asked) :].partition(_ANSWER)[0] if answered.startswith(asked) else ""


def closing(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template writes behind the last answer to end the turn, with the tokens that do so: "<|im_end|>".

    Empty where the template ends a turn with nothing; then EOS is put behind the last answer.

    Raises:
        InputError: see `lead`.
    """
    tail = _probed(tokenizer, _ANSWERED).rpartition(_ANSWER)[2]
    marks = _marks(tokenizer)
    first = min((tail.find(mark) for mark in marks if mark in tail), default=-1)
    if first < 0:
        return tail.rstrip()
    end = first  # What follows directly is part of it, as <|END_RESPONSE|><|END_OF_TURN_TOKEN|> in Command R7B.
    while following := max((mark for mark in marks if tail.startswith(mark, end)), key=len, default=""):
        end += len(following)
    return tail[:end]


def inner_closing(tokenizer: PreTrainedTokenizerBase) -> str:
    """What ends an answer that another turn follows: mostly as `closing`, but <|end|> for <|return|> in gpt-oss.

    Raises:
        InputError: see `lead`.
    """
    last = closing(tokenizer)
    again = ({"role": "user", "content": _SECOND}, {"role": "assistant", "content": _SECOND})
    try:
        text = _rendered(tokenizer, (*_ANSWERED, *again))
    except Refused:  # a template for one turn alone
        return last
    behind = text.partition(_ANSWER)[2].partition(_SECOND)[0]
    if not last or behind.startswith(last):
        return last
    marks = _marks(tokenizer)
    first = min((behind.find(mark) for mark in marks if mark in behind), default=-1)
    if first < 0:
        return ""
    end = behind[:first] + max((mark for mark in marks if behind.startswith(mark, first)), key=len)
    # What ends the user's turns, too, is an end; else it may be the next header.
    return end if text.partition(_QUESTION)[2].startswith(end) else ""


_FUNCTION = "question_of_fourbit"
_OPTIONAL: dict[str, dict[str, Any]] = {
    "tools": {
        "messages": _ASKED,
        "tools": [{"type": "function", "function": {"name": _FUNCTION, "description": "", "parameters": {}}}],
    },
    "tool_calls": {
        "messages": (
            *_ASKED,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "000000000", "type": "function", "function": {"name": _FUNCTION, "arguments": {}}}
                ],
            },
        )
    },
    "reasoning_content": {
        "messages": (*_ASKED, {"role": "assistant", "content": _ANSWER, "reasoning_content": _FUNCTION})
    },
}


def left_out(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """What a template says nothing of, though a conversation has it: tools, tool_calls, reasoning_content, system."""
    missing = set()
    for name, probe in _OPTIONAL.items():
        try:
            takes = _FUNCTION in _rendered(tokenizer, probe["messages"], tools=probe.get("tools", ()))
        except Refused:  # it may want a content, or a tool's answer; then it is each conversation that tells
            takes = name == "tool_calls"
        if not takes:
            missing.add(name)
    try:
        told = _SECOND in _rendered(tokenizer, ({"role": "system", "content": _SECOND}, *_ANSWERED))
    except Refused:
        told = False
    return frozenset(missing if told else missing | {"system"})


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int | str]:
    """What ends an assistant's turn, for whoever generates: token ids, and text where it is no single token.

    Raises:
        InputError: see `lead`.
    """
    end = closing(tokenizer).strip()
    ends: list[int | str] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if end:
        marks = {tokenizer.convert_tokens_to_ids(mark) for mark in _marks(tokenizer)}
        ends += [token for token in tokenizer(end, add_special_tokens=False)["input_ids"] if token in marks] or [end]
    return list(dict.fromkeys(ends))


def _probed(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], *, add_generation_prompt: bool = False
) -> str:
    try:
        return _rendered(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except Refused as reason:
        raise InputError(f"The chat template cannot be used: {reason}.") from reason


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Turn],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    turns: Any = list(messages)
    offered: Any = list(tools) or None
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tools=offered, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except Exception as error:  # whatever a template does
        raise Refused(" ".join(str(error).split())[:200].rstrip(".") or type(error).__name__) from error


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special and added tokens, without those of white space alone, which some vocabularies add."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {text for token in (*tokenizer.all_special_tokens, *added.values()) if (text := str(token)) and text.strip()}
