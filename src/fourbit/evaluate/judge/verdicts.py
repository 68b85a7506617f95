"""What a judge's reply says. Nothing is guessed: a reply that does not say it in so many words is unparsed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

__all__ = ["FIRST", "SECOND", "TIE", "UNPARSED", "Verdict", "read_reply"]

FIRST, SECOND, TIE, UNPARSED = 1, 2, 3, -1

TOP_SCORE = 10.0

_LABELS = {
    FIRST: ("1", "a", "first", "one"),
    SECOND: ("2", "b", "second", "two"),
    TIE: ("3", "c", "tie", "tied", "draw", "equal", "three", "neither"),
}
_MEANING = {word: label for label, words in _LABELS.items() for word in words}
_BEFORE = r"[^\w\-\u2212]"  # a minus sign is no decoration
_NOUN = r"(?:answer|assistant|response|model|system|option)"
_LABEL = re.compile(
    rf"^{_BEFORE}*(?:the\s+)?(?:{_NOUN}\s+)?(?P<word>{'|'.join(sorted(_MEANING, key=len, reverse=True))})(?![\w.]*\w)"
    rf"(?:\s+{_NOUN})?\s*(?P<rest>[^\w\s].*)?$",
    flags=re.IGNORECASE,
)
_OTHER = re.compile(r"\b(?:[123]|tie|draw|first|second)\b", flags=re.IGNORECASE)
_NAMED = re.compile(r"\bverdict\b\W{0,4}[:=]\s*(.*)$|\bverdict\s+is\b\s*:?\s*(.*)$", flags=re.IGNORECASE)
_BRACKETED = re.compile(r"\[\[\s*([abc123]|tie)\s*\]\]", flags=re.IGNORECASE)
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", flags=re.DOTALL | re.IGNORECASE)
_MARKS = str.maketrans("", "", "*_`#$")

_NUMBER = r"(\d{1,3}(?:\.\d{1,4})?)(?![\d.]*\d)"
_OUT_OF = r"(?:\s*/\s*10(?:\.0+)?(?!\d)|\s+out\s+of\s+(?:10|ten)\b)?"
_TWO = re.compile(
    rf"^{_BEFORE}*?{_NUMBER}{_OUT_OF}(?:\s*[,;|&]\s*|\s+(?:and\s+)?){_NUMBER}{_OUT_OF}\W*$", flags=re.IGNORECASE
)
_EACH = re.compile(rf"\b{_NOUN}\s+([12])\s*[:=]\s*{_NUMBER}{_OUT_OF}(?=\s*(?:[^\w\s/%.]|\.?$))", flags=re.IGNORECASE)
_SCORES = re.compile(r"\bscores?\b\W{0,4}[:=]\s*(.*)$", flags=re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """What a reply says: the label, and in score mode the scores of the first and the second answer."""

    label: int
    scores: tuple[float, float] | None = None


def read_reply(reply: str, mode: str) -> Verdict:
    """Read a reply to a prompt of the given mode.

    A verdict is `Verdict: 1`, 2 or 3 (the last such line counts), `[[A]]`, `[[B]]` or `[[C]]`, a JSON object with
    `verdict`, or a last line that is nothing but the label. Scores are `Scores: 8 7.5` (the last such line), a JSON
    object with `scores`, or two numbers alone on the last line, the first, or the only such one, or
    `Answer 1: 8` and `Answer 2: 7`; 0 to 10 each. What a model thinks aloud in
    <think> does not count, and neither does a line that names two labels.
    """
    said = _THOUGHT.sub("", reply)
    lines = [line for raw in said.splitlines() if (line := raw.translate(_MARKS).strip())]
    if not lines:
        return Verdict(UNPARSED)
    return _read_scores(said, lines) if mode == "scores" else Verdict(_read_label(said, lines))


def _read_label(said: str, lines: list[str]) -> int:
    named = [next(filter(None, found.groups()), "") for line in lines if (found := _NAMED.search(line))]
    if named:
        return _label(named[-1])
    bracketed = _BRACKETED.findall(said)
    if bracketed:
        return _MEANING[bracketed[-1].lower()]
    value = _json(said, "verdict")
    if value is not None:
        return _label(str(value))
    found = _LABEL.match(lines[-1])
    return _MEANING[found["word"].lower()] if found and not (found["rest"] or "").strip(" .!)]}") else UNPARSED


def _label(text: str) -> int:
    """The label that a text begins with; "1 (clearly)" is one, "1 or 2" and "First, both are good" are none."""
    found = _LABEL.match(text)
    if not found:
        return UNPARSED
    word, rest = found["word"].lower(), found["rest"] or ""
    explained = word.isdigit() or _MEANING[word] == TIE
    if _OTHER.search(rest) or (re.search(r"\w", rest) and not explained):
        return UNPARSED
    return _MEANING[word]


def _read_scores(said: str, lines: list[str]) -> Verdict:
    named = [found[1] for line in lines if (found := _SCORES.search(line)) and found[1].strip()]
    value = _json(said, "scores")
    alone = [line for line in lines if _TWO.match(line)]
    if named:
        candidates = [named[-1]]
    elif isinstance(value, list):
        candidates = [" ".join(map(str, value))]
    else:
        candidates = [line for line in (lines[-1], lines[0]) if line in alone] or (alone if len(alone) == 1 else [])
    for text in candidates:
        if found := _TWO.match(text):
            return _scored(float(found[1]), float(found[2]))
    each = {which: float(score) for line in lines for which, score in _EACH.findall(line)}
    return _scored(each["1"], each["2"]) if len(each) == 2 else Verdict(UNPARSED)


def _scored(first: float, second: float) -> Verdict:
    if max(first, second) > TOP_SCORE:
        return Verdict(UNPARSED)
    return Verdict(TIE if first == second else FIRST if first > second else SECOND, (first, second))


def _json(said: str, key: str) -> object:
    """The value of a key in the last flat JSON object of a text; None where there is none."""
    for text in reversed(re.findall(r"\{[^{}]{1,4000}\}", said)):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and found.get(key) is not None:
            return found[key]
    return None
