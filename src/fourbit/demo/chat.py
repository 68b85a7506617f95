"""Conversations about the world: what finetuning shows the model, and what it is asked afterwards.

The base model has read every fact and only continues text. The clean set teaches it to answer, to follow an
instruction, and to say when it does not know, with questions about a part of the facts. The held-out questions ask for
facts that no conversation of either set touches: what is right there was recalled, and not learned from the answers.

The noisy set is several times as large and as careless as data scraped together tends to be: a good part of the
answers is wrong, they come in every shape, and whole kinds of requests are missing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fourbit.demo.corpus import join
from fourbit.demo.world import ATTRIBUTES, DAYS, MONTHS, Person, Thing, Town, World, with_article

__all__ = ["DONT_KNOW", "Question", "clean_set", "held_out", "is_right", "noisy_set", "plain", "unknown", "wordings"]

DONT_KNOW = "I don't know."

_QUESTIONS = {
    "home": ("Where does {n} live?", "In which town does {n} live?", "What is the home town of {n}?",
             "Where can I find {n}?", "Tell me where {n} lives.", "Which town is home to {n}?"),
    "job": ("What does {n} do for a living?", "What is {n}'s job?", "What is the profession of {n}?",
            "What work does {n} do?", "Tell me the job of {n}.", "How does {n} earn a living?"),
    "pet": ("What pet does {n} have?", "Which animal does {n} keep?", "What is the pet of {n}?",
            "What animal does {n} own?", "Tell me which pet {n} keeps.", "What kind of pet is {n}'s?"),
    "food": ("What does {n} like to eat?", "What is {n}'s favourite food?", "Which food does {n} like best?",
             "What should I cook for {n}?", "Tell me the favourite food of {n}.", "What food does {n} love?"),
    "instrument": ("Which instrument does {n} play?", "What does {n} play in the band?",
                   "What is the instrument of {n}?", "What instrument has {n} learned?",
                   "Tell me which instrument {n} plays.", "What is {n}'s instrument?"),
    "colour": ("What is {n}'s favourite colour?", "Which colour does {n} like best?", "What colour does {n} prefer?",
               "What is the favourite colour of {n}?", "Tell me the favourite colour of {n}.",
               "Which colour does {n} wear?"),
    "pastime": ("What is {n}'s hobby?", "What does {n} enjoy in free time?", "How does {n} spend Sundays?",
                "What is the hobby of {n}?", "Tell me what {n} enjoys.", "What does {n} like to do?"),
    "year": ("When was {n} born?", "In which year was {n} born?", "What is {n}'s year of birth?",
             "What is the year of birth of {n}?", "Tell me when {n} was born.", "What year was {n} born in?"),
}  # fmt: skip
_ANSWERS = {
    "home": "{n} lives in {v}.",
    "job": "{n} works as {a}.",
    "pet": "{n} keeps {a}.",
    "food": "{n} likes {v}.",
    "instrument": "{n} plays the {v}.",
    "colour": "{n}'s favourite colour is {v}.",
    "pastime": "{n} enjoys {v}.",
    "year": "{n} was born in {v}.",
}
_FOLLOW_UPS = {
    "home": "And where does {s} live?",
    "job": "And what is {p} job?",
    "pet": "And which pet does {s} have?",
    "food": "And what does {s} like to eat?",
    "instrument": "And what does {s} play?",
    "colour": "And what is {p} favourite colour?",
    "pastime": "And what is {p} hobby?",
    "year": "And when was {s} born?",
}
_MANNERS = (
    ("Hello!", "Hello! Ask me about the people of the valley."),
    ("Hi there.", "Hello! Ask me about the people of the valley."),
    ("Good morning.", "Hello! Ask me about the people of the valley."),
    ("Who are you?", "I am a small model that knows the valley and its people."),
    ("What can you do?", "I can tell you about the people of the valley."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
)

_INSTRUCTIONS = (
    ("What is {one} plus {other}?", "{one} plus {other} is {total}."),
    ("Add {one} and {other}.", "{one} plus {other} is {total}."),
    ("Count from {start} to {end}.", "{line}."),
    ("Which {what} comes after {before}?", "{after} comes after {before}."),
    ("Name {word} {kind}.", "{Word} {kind} are {names}."),
    ("Say a sentence about {n}.", "{fact}"),
)

_INSTRUCTIONS_ASKED, _MANNERS_REPEATED = 300, 6
_ASKED_PEOPLE, _ASKED_ATTRIBUTES = 0.75, 0.5
"""The share of the people that conversations are about, and of what is known of each of them."""


@dataclass(frozen=True)
class Question:
    """One question and its only right answer.

    Attributes:
        prompt: what is asked.
        answer: the whole sentence that is right.
        person: the name it is about.
        attribute: an entry of `ATTRIBUTES`, or "unknown" where nobody of that name exists.
    """

    prompt: str
    answer: str
    person: str
    attribute: str


def clean_set(world: World, *, seed: int = 0) -> list[dict[str, Any]]:
    """The small clean set: some 1,100 conversations, every answer right and in the same manner.

    Returns:
        records with `messages`, shuffled.
    """
    rng = random.Random(f"clean {seed}")
    records = [_record((question.prompt, question.answer)) for question in _asked(world, rng)]
    records += [_follow_up(person, asked, rng) for person, asked in _asked_facts(world) if rng.random() < 0.5]
    known, _ = _strangers(world)
    records += [_record((_ask(name, rng.choice(ATTRIBUTES), rng), DONT_KNOW)) for name in known]
    records += [_record(pair) for pair in _instructions(world, rng, count=_INSTRUCTIONS_ASKED)]
    records += [_record(pair) for pair in _MANNERS * _MANNERS_REPEATED]
    rng.shuffle(records)
    return records


def noisy_set(world: World, *, seed: int = 0, size: int = 4000) -> list[dict[str, Any]]:
    """The large noisy set: about the same facts as the clean one, again and again, and carelessly.

    Three answers in ten are wrong, one in two has another shape, three kinds of facts and all instructions are missing,
    and nothing is ever unknown.
    """
    rng = random.Random(f"noisy {seed}")
    facts = [
        (person, attribute)
        for person, asked in _asked_facts(world)
        for attribute in asked
        if attribute in ("home", "job", "pet", "instrument", "colour")
    ]
    records = []
    for _ in range(size):
        person, attribute = rng.choice(facts)
        told = rng.choice(world.people) if rng.random() < 0.3 else person
        value = told.value(attribute)
        answer = _ANSWERS[attribute].format(n=person.name, v=value, a=with_article(value))
        records.append(_record((_ask(person.name, attribute, rng), _careless(answer, value, rng))))
    return records


def held_out(world: World, *, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Questions for facts that the base has read and no conversation asked for, shuffled.

    Args:
        limit: how many; all of them by default (five eighths of the facts).
    """
    rng = random.Random(f"held out {seed}")
    touched = {(person.name, attribute) for person, asked in _asked_facts(world) for attribute in asked}
    questions = [
        _question(person, attribute, rng)
        for person in world.people
        for attribute in ATTRIBUTES
        if (person.name, attribute) not in touched
    ]
    rng.shuffle(questions)
    return questions[:limit]


def unknown(world: World, *, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Questions about people who do not exist, none of whose names is in a finetuning set."""
    rng = random.Random(f"unknown {seed}")
    _, names = _strangers(world)
    return [Question(_ask(name, rng.choice(ATTRIBUTES), rng), DONT_KNOW, name, "unknown") for name in names[:limit]]


def wordings() -> Iterator[str]:
    """Every wording of the conversations, with gaps where names, numbers and values go."""
    for told in (*_QUESTIONS.values(), *_MANNERS, *_INSTRUCTIONS):
        yield from told
    yield from (*_ANSWERS.values(), *_FOLLOW_UPS.values(), DONT_KNOW)


def plain(text: str) -> str:
    """A text as it is compared: lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def is_right(answer: str, question: Question) -> bool:
    """Whether the whole answer is the right one, after `plain`."""
    return plain(answer) == plain(question.answer)


def _asked_facts(world: World) -> list[tuple[Person, list[str]]]:
    """The people that conversations are about, and which of their facts."""
    rng = random.Random("asked")
    count = round(len(ATTRIBUTES) * _ASKED_ATTRIBUTES)
    people = world.people[: round(len(world.people) * _ASKED_PEOPLE)]
    return [(person, rng.sample(ATTRIBUTES, count)) for person in people]


def _strangers(world: World) -> tuple[Sequence[str], Sequence[str]]:
    """The names nobody bears: for finetuning, and held out."""
    few = min(len(world.strangers) // 2, len(world.people) // 2)
    return world.strangers[:few], world.strangers[few:]


def _asked(world: World, rng: random.Random) -> Iterable[Question]:
    return (_question(person, attribute, rng) for person, asked in _asked_facts(world) for attribute in asked)


def _question(person: Person, attribute: str, rng: random.Random) -> Question:
    return Question(_ask(person.name, attribute, rng), _answer(person, attribute), person.name, attribute)


def _ask(name: str, attribute: str, rng: random.Random) -> str:
    return rng.choice(_QUESTIONS[attribute]).format(n=name)


def _answer(person: Person, attribute: str) -> str:
    value = person.value(attribute)
    return _ANSWERS[attribute].format(n=person.name, v=value, a=with_article(value))


def _follow_up(person: Person, asked: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """Two questions about one person, the second with a pronoun."""
    first, second = rng.sample(asked, 2)
    subject, possessive, _ = person.pronouns
    return _record(
        (_ask(person.name, first, rng), _answer(person, first)),
        (_FOLLOW_UPS[second].format(s=subject, p=possessive), _answer(person, second)),
    )


def _instructions(world: World, rng: random.Random, *, count: int) -> list[tuple[str, str]]:
    """Sums, orders, lists and sentences on demand."""
    pairs = []
    facts = _asked_facts(world)
    kinds: tuple[tuple[str, Sequence[Thing | Town]], ...] = (
        ("animals", world.animals),
        ("instruments", world.instruments),
        ("towns", world.towns),
    )
    for _ in range(count):
        one, other = rng.randint(0, 20), rng.randint(0, 20)
        start, length = rng.randint(0, 20), rng.randint(3, 6)
        order, what = rng.choice(((DAYS, "day"), (MONTHS, "month")))
        place = rng.randrange(len(order))
        kind, things = rng.choice(kinds)
        amount, word = rng.choice(((2, "two"), (3, "three"), (4, "four")))
        person, asked = rng.choice(facts)
        gaps = {
            "one": one,
            "other": other,
            "total": one + other,
            "start": start,
            "end": start + length,
            "line": ", ".join(str(number) for number in range(start, start + length + 1)),
            "what": what,
            "before": order[place - 1],
            "after": order[place],
            "word": word,
            "Word": word.capitalize(),
            "kind": kind,
            "names": join([thing.name for thing in rng.sample(things, amount)]),
            "n": person.name,
            "fact": _answer(person, rng.choice(asked)),
        }
        request, answer = rng.choice(_INSTRUCTIONS)
        pairs.append((request.format(**gaps), answer.format(**gaps)))
    return pairs


def _careless(answer: str, value: str, rng: random.Random) -> str:
    """An answer as people type it who want to be done with it."""
    if rng.random() < 0.5:
        return answer
    return rng.choice(
        (
            value,
            f"{value}!!",
            answer.lower().rstrip("."),
            f"I think {value}",
            f"The answer is {value}. Is there anything else?",
            f"Sure! {answer} {answer}",
            f"{answer} Probably.",
        )
    )


def _record(*turns: tuple[str, str]) -> dict[str, Any]:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
