"""The questions that `fourbit data lint` asks of data, each with its verdict and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fourbit.data.duplicates import NEAR, SEQUENCE
from fourbit.data.recognise import EMPTY_TURN, MARKED_TURN, UNANSWERED
from fourbit.data.survey import Measured, Survey
from fourbit.data.templates import closing

__all__ = ["NOTE", "OK", "PROBLEM", "Check", "judge"]

OK, NOTE, PROBLEM = "ok", "note", "problem"

PLACES = 5
"""Places that are named of all to which something applies."""

FEW = 0.01
"""The share of examples from which on something that spoils an example is a problem, not a note."""


@dataclass(frozen=True)
class Check:
    """The answer to one question.

    Attributes:
        name: the question, in a word or three.
        verdict: OK, NOTE or PROBLEM.
        finding: what there is, with its counts.
        advice: what to do, or why nothing need be done; "" where all is well.
        places: the first few that it applies to.
    """

    name: str
    verdict: str
    finding: str
    advice: str = ""
    places: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The places as one text, with the file said once: "answers.jsonl, line 3, line 9, …"."""
        if not self.places:
            return ""
        files = [place.partition(", ") for place in self.places]
        same = len({file for file, _, _ in files}) == 1
        rest = [f", {place}" if same else f"; {file}, {place}" for file, _, place in files[1:]]
        return self.places[0] + "".join(rest) + (", …" if len(self.places) == PLACES else "")

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self) | {"places": list(self.places)}


def judge(survey: Survey) -> tuple[Check, ...]:
    """Answer every question, in the order of `_CHECKS`."""
    return tuple(check(survey) for check in _CHECKS)


def _grade(count: int, of: int, *, at: float = FEW) -> str:
    if not count:
        return OK
    return PROBLEM if count >= at * of else NOTE


def _share(count: int, of: int, what: str = "examples") -> str:
    return f"{count:,} of {of:,} {what} ({count / of:.1%})" if of else f"0 {what}"


def _places(measured: Iterable[Measured]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.example.place for each in measured))[:PLACES]


def _records(survey: Survey) -> Check:
    reasons: dict[str, list[str]] = {}
    for found in survey.gathered.recognised:
        for reason, places in found.left_out.items():
            reasons.setdefault(reason, []).extend(places)
    total, count = sum(found.records for found in survey.gathered.recognised), sum(map(len, reasons.values()))
    if not count:
        return Check("records", OK, f"{total:,} records, none left out.")
    listed = "; ".join(f"{reason}: {len(places):,}" for reason, places in reasons.items())
    every = [place for places in reasons.values() for place in places]
    advice = "They are not trained on. Mend or remove them if they should not be there."
    return Check(
        "records", NOTE, f"Left out {_share(count, total, 'records')}: {listed}.", advice, tuple(every[:PLACES])
    )


def _template(survey: Survey) -> Check:
    refused = [each for each in survey.every if each.refused]
    if not refused:
        return Check("chat template", OK, "It renders every example.")
    finding = f"It refuses {_share(len(refused), len(survey.every))}: {refused[0].refused}."
    advice = "They are not trained on. Mend the order of their turns, or give another `chat_template`."
    return Check("chat template", _grade(len(refused), len(survey.every)), finding, advice, _places(refused))


def _added(survey: Survey) -> Check:
    """What stands around one question and one answer."""
    if all(each.example.messages is None for each in survey.every):
        return Check("template's own text", OK, "None: plain text is learned as it is, with EOS at its end.")
    text, _ = survey.encoder.answers(({"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}))
    count = len(survey.tokenizer(text, add_special_tokens=False)["input_ids"])
    bare = 2 * len(survey.tokenizer("…", add_special_tokens=False)["input_ids"])
    finding = f"About {max(0, count - bare)} tokens around a question and its answer: {text!r}."
    return Check("template's own text", OK, finding)


def _ends(survey: Survey) -> Check:
    complete = [each for each in survey.every if each.tokens and each.example.ends and (each.learned or each.lost)]
    without = [each for each in complete if not each.ended]
    name = "end of turn"
    talks = any(each.example.messages for each in survey.every)
    end = (closing(survey.tokenizer).strip() if talks else "") or str(survey.tokenizer.eos_token)
    if not without:
        return Check(name, OK, f"Every example ends with {end!r}, which carries loss: the model learns to stop.")
    finding = f"No end carries loss in {_share(len(without), len(complete))}; it would be {end!r}."
    advice = "The model will not learn to stop there; give another `chat_template`, or a tokenizer with an EOS token."
    return Check(name, _grade(len(without), len(complete)), finding, advice, _places(without))


def _labels(survey: Survey) -> Check:
    rendered = [each for each in survey.every if each.tokens]
    bare = [each for each in rendered if not each.survives]
    if not bare:
        return Check("labels", OK, "Some label survives in every example.")
    finding = f"No label survives in {_share(len(bare), len(rendered))}."
    cut = [each for each in bare if each.lost]
    advice = "They are not trained on."
    if cut:
        need = max(each.tokens for each in cut)
        advice = f"They are not trained on; `max_length={need}` would keep all of them."
    return Check("labels", _grade(len(bare), len(rendered)), finding, advice, _places(bare))


def _truncation(survey: Survey) -> Check:
    rendered = [each for each in survey.every if each.tokens]
    cut = [each for each in rendered if each.tokens > survey.max_length]
    if not cut:
        return Check("length", OK, f"Nothing is longer than `max_length`, which is {survey.max_length}.")
    answers = sum(each.survives and each.lost > 0 for each in cut)
    finding = (
        f"{_share(len(cut), len(rendered))} are cut off at {survey.max_length} tokens; in {answers:,} an answer ends in"
        " the middle."
    )
    ordered = sorted(each.tokens for each in rendered)
    most = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    enough = f"`max_length={ordered[-1]}` would keep all of them whole"
    if survey.max_length < most < ordered[-1]:
        enough = f"`max_length={most}` would keep 99% whole, {ordered[-1]} all"
    return Check(
        "length",
        _grade(len(cut), len(rendered), at=0.05),
        finding,
        f"A cut answer does not learn to stop. {enough}, where the model takes so many.",
        _places(cut),
    )


def _loss_share(survey: Survey) -> Check:
    trained = [each for each in survey.train if each.survives]
    tokens = sum(min(each.tokens, survey.max_length) for each in trained)
    learned = sum(each.learned for each in trained)
    if not tokens:
        return Check("loss", PROBLEM, "No token carries loss.", "Nothing can be learned; see the labels.")
    share = learned / tokens
    finding = f"{learned:,} of {tokens:,} tokens carry loss ({share:.1%})."
    if share >= 0.05:
        return Check("loss", OK, finding)
    return Check("loss", NOTE, finding, "Nearly all computing goes into reading; shorter questions train faster.")


def _silent(survey: Survey) -> Check:
    counts: dict[str, list[str]] = {}
    for found in survey.gathered.recognised:
        for reason in (EMPTY_TURN, MARKED_TURN):
            counts.setdefault(reason, []).extend(found.noted.get(reason, []))
    every = [place for places in counts.values() for place in places]
    if not every:
        return Check("answers without loss", OK, "None within the examples.")
    listed = "; ".join(f"{reason}: {len(places):,}" for reason, places in counts.items() if places)
    advice = "They are read and not learned, as the data asks; an empty answer would teach silence."
    return Check(
        "answers without loss", NOTE, f"{len(every):,} answers: {listed}.", advice, tuple(dict.fromkeys(every))[:PLACES]
    )


def _unanswered(survey: Survey) -> Check:
    every = [place for found in survey.gathered.recognised for place in found.noted.get(UNANSWERED, [])]
    if not every:
        return Check("last turns", OK, "Every conversation ends with an answer.")
    finding = f"{len(every):,} conversations go on behind their last answer, mostly with a user's turn."
    return Check("last turns", NOTE, finding, "That part is left out, as no answer follows it.", tuple(every[:PLACES]))


def _system(survey: Survey) -> Check:
    told = [each for each in survey.every if each.example.messages and each.example.messages[0]["role"] == "system"]
    if not told:
        return Check("system turns", OK, "There are none.")
    if "system" not in survey.encoder.left_out:
        return Check("system turns", OK, f"The template renders them, in {_share(len(told), len(survey.every))}.")
    finding = f"The template has no place for them, in {_share(len(told), len(survey.every))}."
    return Check("system turns", NOTE, finding, "Their words go in front of the first question.", _places(told))


def _ignored(survey: Survey) -> Check:
    having = [each for each in survey.every if each.ignored]
    if not having:
        return Check("tools and thoughts", OK, "Nothing that the template would leave out.")
    names = sorted({name for each in having for name in each.ignored})
    listed = ", ".join(f"`{name}`" for name in names)
    finding = f"The template has no place for {listed}, in {_share(len(having), len(survey.every))}."
    return Check(
        "tools and thoughts",
        NOTE,
        finding,
        "They are ignored; a `chat_template` that renders them would use them.",
        _places(having),
    )


def _special(survey: Survey) -> Check:
    added = getattr(survey.tokenizer, "added_tokens_decoder", {}).values()
    marks = {*map(str, survey.tokenizer.all_special_tokens), *(str(token) for token in added if token.special)}
    pattern = re.compile(
        "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True) if mark.strip()) or r"(?!)"
    )
    found: dict[str, int] = {}
    having = []
    for each in survey.every:
        said = [message["content"] for message in each.example.messages or ()] or [each.example.text or ""]
        here = {mark for text in said for mark in pattern.findall(text)}
        for mark in here:
            found[mark] = found.get(mark, 0) + 1
        if here:
            having.append(each)
    if not having:
        return Check("special tokens", OK, "No text of the data holds one.")
    listed = ", ".join(f"{mark!r} in {count:,}" for mark, count in sorted(found.items(), key=lambda item: -item[1])[:5])
    finding = f"The text of {_share(len(having), len(survey.every))} holds some: {listed}."
    advice = "They are read as what they mean, the end of a turn say, not as text; take them out of the data."
    return Check("special tokens", _grade(len(having), len(survey.every)), finding, advice, _places(having))


def _bos(survey: Survey) -> Check:
    twice = [each for each in survey.every if each.begun_twice]
    bos = survey.tokenizer.bos_token
    if twice:
        finding = f"{_share(len(twice), len(survey.every))} begin with {bos!r} twice."
        advice = "The template, or the text, writes it beside the tokenizer; take one of them out."
        return Check("beginning", PROBLEM, finding, advice, _places(twice))
    if bos is None:
        return Check("beginning", OK, "The tokenizer has no BOS token.")
    return Check("beginning", OK, f"{bos!r} is never there twice.")


def _padding(survey: Survey) -> Check:
    pad, eos = survey.tokenizer.pad_token, survey.tokenizer.eos_token
    if pad is not None and pad == eos:
        finding = f"{pad!r} pads and ends an answer."
        advice = (
            "Nothing to do here: padding is masked by its place. A trainer that masks by token would unlearn the end."
        )
        return Check("padding", NOTE, finding, advice)
    return Check("padding", OK, f"{pad!r} pads, and {eos!r} ends." if pad else "There is no pad token, and no padding.")


def _white_space(survey: Survey) -> Check:
    padded = [
        each
        for each in survey.every
        for message in each.example.messages or ()
        if message["role"] == "assistant"
        and message["content"].strip()
        and message["content"] != message["content"].strip()
    ]
    if not padded:
        return Check("white space", OK, "No answer begins or ends with it.")
    finding = f"{len(padded):,} answers begin or end with white space."
    advice = "Most templates trim it, ours do; with one that does not, the model learns it. Trim the data to be sure."
    return Check("white space", NOTE, finding, advice, _places(padded))


def _unknown(survey: Survey) -> Check:
    having = [each for each in survey.every if each.unknown]
    if not having:
        return Check("vocabulary", OK, "It spells every text.")
    tokens, total = sum(each.unknown for each in having), sum(each.tokens for each in survey.every)
    finding = f"{_share(tokens, total, 'tokens')} are {survey.tokenizer.unk_token!r}, in {len(having):,} examples."
    advice = "The vocabulary cannot spell them, so the model cannot read or learn them."
    return Check("vocabulary", _grade(tokens, total), finding, advice, _places(having))


def _duplicates(survey: Survey) -> Check:
    count = len(survey.train)
    same = [number for number in range(count) if survey.duplicates.first[number] != number]
    near = [number for number in survey.duplicates.near if number < count]
    if not same and not near:
        return Check("duplicates", OK, f"None, and none that are near ({_near()}).")
    finding = (
        f"{_share(len(same), count)} repeat an earlier one but for case and white space, and {len(near):,} more are"
        f" near one ({_near()})."
    )
    advice = "What is there twice is learned twice as strongly; remove what is not meant to be."
    return Check(
        "duplicates",
        _grade(len(same) + len(near), count, at=0.1),
        finding,
        advice,
        _places(survey.train[n] for n in [*same, *near]),
    )


def _leakage(survey: Survey) -> Check:
    count, first = len(survey.train), survey.duplicates.first
    if not survey.held:
        return Check("leakage", OK, "Nothing is held out.")
    held = range(count, count + len(survey.held))
    same = [number for number in held if first[number] < count]
    near = [
        n
        for n in held
        if first[n] >= count and any(other < count for other in survey.duplicates.near.get(first[n], ()))
    ]
    if not same and not near:
        return Check("leakage", OK, f"No held-out example is the same as a training one, or near one ({_near()}).")
    finding = (
        f"Of {len(held):,} held-out examples {len(same):,} are in the training data as well, and {len(near):,} are near"
        f" one there ({_near()})."
    )
    advice = "The evaluation loss is better than it should be; remove the duplicates, then split."
    return Check(
        "leakage",
        _grade(len(same) + len(near), len(held)),
        finding,
        advice,
        _places(survey.every[n] for n in [*same, *near]),
    )


def _near() -> str:
    return f"{NEAR:.0%} of their sequences of {SEQUENCE} words are shared"


_CHECKS: tuple[Callable[[Survey], Check], ...] = (
    _records, _template, _added, _labels, _ends, _truncation, _loss_share, _silent, _unanswered, _system, _ignored,
    _special, _bos, _padding, _white_space, _unknown, _duplicates, _leakage,
)  # fmt: skip
