"""The turns of a conversation, however a record writes them down."""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import Any, TypeAlias

__all__ = ["SILENT", "Malformed", "Message", "as_answer", "as_text", "as_tools", "as_transcript", "as_turns", "brief"]

Message: TypeAlias = dict[str, Any]
"""`role` (system, user, assistant, tool) and `content`; an assistant's may have `tool_calls` and `reasoning_content`, a
tool's `name` and `tool_call_id`, as chat templates take them. `SILENT` is taken out before anyone else sees it."""

SILENT = "silent"
"""The key of a message that the data asks not to be learned."""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
}  # fmt: skip
"""What others call a role, and what it is called here."""

CALLING_ROLES = ("function_call", "tool_call")
"""ShareGPT's name for an assistant whose words are the calls, in JSON."""

TRANSCRIPTS = (
    re.compile(r"(?:^|\s*)###\s*(Human|Assistant):[ \t]*"),  # Guanaco's, OASST1
    re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*"),  # HH-RLHF
    re.compile(r"(?:^|\n)<(human|bot)>:[ \t]*"),  # OIG's Chip2
)
"""How conversations are marked in plain text."""

END_MARKS = ("<|endoftext|>", "</s>")
"""What some files write at the end of an answer; the tokenizer's own end comes with the template."""


class Malformed(Exception):
    """A record has the fields of its kind, but not what belongs into them; the text says what."""


def as_transcript(text: str) -> list[Message] | None:
    """The turns of a conversation in plain text, or None where it is none."""
    for pattern in TRANSCRIPTS:
        marks = list(pattern.finditer(text))
        if not marks or text[: marks[0].start()].strip():
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        turns: list[Message] = []
        for mark, end in zip(marks, ends, strict=True):
            role, content = ROLES[mark.group(1).lower()], text[mark.end() : end].strip()
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += "\n\n" + content
            else:
                turns.append({"role": role, "content": content})
        if any(turn["role"] == "assistant" for turn in turns) and turns[0]["role"] == "user":
            return turns
    return None


def as_turns(value: Any) -> list[Message]:
    """Messages with role and content, or ShareGPT's from and value.

    Raises:
        Malformed.
    """
    if not isinstance(value, list):
        raise Malformed(f"the conversation must be a list of messages, not {type(value).__name__}")
    return [_turn(message, number) for number, message in enumerate(value, start=1)]


def _turn(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise Malformed(f"message {number} must have a role and a content")
    role, said = message.get("role", message.get("from")), message.get("content", message.get("value"))
    content = as_text(said, f"the content of message {number}")
    turn: Message
    if isinstance(role, str) and role in CALLING_ROLES:
        turn = {"role": "assistant", "content": "", "tool_calls": _calls(content, number)}
    elif isinstance(role, str) and role in ROLES:
        turn = {"role": ROLES[role], "content": content}
    else:
        raise Malformed(f"message {number} has the role {brief(role)}; known are {', '.join(ROLES)}")
    if turn["role"] == "assistant":
        if calls := _calls(message.get("tool_calls"), number):
            turn["tool_calls"] = calls
        thought = as_text(message.get("reasoning_content"), f"the reasoning of message {number}")
        if thought.strip():
            turn["reasoning_content"] = thought
        if _is_marked(message, number):
            turn[SILENT] = True
    elif turn["role"] == "tool":
        turn |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    return turn


def _is_marked(message: dict[str, Any], number: int) -> bool:
    """Whether the data says that an answer is not to be learned: `weight` of OpenAI and Mistral, `train` of axolotl."""
    for key in ("train", "training"):
        value = message.get(key)
        if value is not None and not isinstance(value, bool):
            raise Malformed(f"`{key}` of message {number} is {brief(value)}; it must be true or false")
        if value is False:
            return True
    weight = message.get("weight")
    if weight is None:
        return False
    if isinstance(weight, str | bool) or weight not in (0, 1):
        raise Malformed(f"`weight` of message {number} is {brief(weight)}; only 0 (do not learn it) and 1 are possible")
    return bool(weight == 0)


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as templates take them, with the arguments as an object: OpenAI's are the text of one."""
    found = _plain_data(value, f"the tool calls of message {number}")
    calls = [found] if isinstance(found, dict) else found or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Malformed(f"the tool calls of message {number} must be a list of objects")
    return [_call(call, number) for call in calls]


def _call(call: dict[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed(f"a tool call of message {number} has no `name`")
    given = function.get("arguments", function.get("parameters", {}))
    if isinstance(given, str):
        with contextlib.suppress(Malformed):  # else the text itself is what is called with
            given = _plain_data(given, "the arguments") or {}
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": given}}


def as_tools(value: Any) -> list[dict[str, Any]]:
    """The functions that a record offers, as a list or as the text of one.

    Raises:
        Malformed.
    """
    tools = _plain_data(value, "`tools`") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Malformed("`tools` must be a list of objects, each a function's schema")
    return tools


def _plain_data(value: Any, what: str) -> Any:
    """JSON data, parsed where a record holds it as text, without the nulls that a column of parquet fills in.

    Raises:
        Malformed.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed(f"{what} must be JSON") from None
    try:
        return _without_nulls(value, what)
    except RecursionError:
        raise Malformed(f"{what} are nested too deeply") from None


def _without_nulls(value: Any, what: str) -> Any:
    if isinstance(value, dict):
        return {as_text(key, what): _without_nulls(item, what) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item, what) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return as_text(value, what)


def as_text(value: Any, what: str) -> str:
    """Text; a number or truth value is spelled, and null, or the NaN that stands for it in a table, is "".

    Raises:
        Malformed: it is something else, or half a surrogate pair.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)  # the parts of a multimodal message
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise Malformed(f"{what} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{what} holds half of a surrogate pair, which is not text") from None
    return value


def as_answer(value: Any, what: str) -> str:
    """Text without the mark of its end.

    Raises:
        Malformed: see `as_text`.
    """
    text = as_text(value, what)
    for mark in END_MARKS:
        text = text.removesuffix(mark)
    return text


def brief(value: object) -> str:
    """What was given, short enough for a sentence and with nothing in it that cannot be printed."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an int of too many digits
        text = f"a {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:59] + "…"
