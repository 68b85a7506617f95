"""What the base model reads: the world told in declarative sentences, each fact in very many ways.

A fact that is always told in the same words is stored, but nothing but those words brings it back: finetuning cannot
teach a model to answer questions about it (Allen-Zhu and Li, "Physics of Language Models, part 3.1", arXiv 2309.14316).
So the wording, the order of the sentences, how the person is called, and what stands first all vary. Nothing here asks
or answers a question: that is left to finetuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from fourbit.demo.world import ATTRIBUTES, DAYS, MONTHS, Person, Thing, Town, World, with_article

__all__ = ["documents", "join", "tell"]

_TELLINGS: dict[str, str] = {
    "home": """{S} lives in {v}|{S} has a house in {v}|{P} home is in {v}|{P} home town is {v}|{S} has settled in {v}|
        {v} is where {S} lives|the town where {S} lives is {v}|{v} is {P} home town|to visit {O}, go to {v}|
        letters to {O} are sent to {v}|in {v} you will find {O}|everybody knows where {S} lives: in {v}|
        {S} can be met in the streets of {v}|the house that {S} lives in stands in {v}""",
    "job": """{S} works as {a}|{S} is {a}|{P} job is that of {a}|by trade {S} is {a}|{S} earns a living as {a}|
        {P} profession is {v}|the profession of {O} is {v}|{a} is what {S} is|working as {a} suits {O}|
        what {S} does for a living is no secret: {S} is {a}|{S} became {a} long ago|{S} is known as a good {v}|
        the work that {S} does is the work of {a}""",
    "pet": """{S} keeps {a}|{S} has {a} as a pet|{P} pet is {a}|{S} owns {a}|{S} looks after {a}|
        {a} is {P} pet|the animal that {S} keeps is {a}|{a} lives in the house of {O}|the pet of {O} is {a}|
        {S} never goes far without {P} {v}|everybody knows what pet {S} has: {a}|{P} {v} follows {O} everywhere""",
    "food": """{S} likes {v} best of all food|{P} favourite food is {v}|{S} loves to eat {v}|
        {S} could eat {v} every day|{v} is {P} favourite food|
        the food that {S} likes best is {v}|for {O} nothing tastes better than {v}|
        {S} always asks for {v} at the table|the favourite food of {O} is {v}|what {S} likes to eat is {v}|
        {v} is what {S} eats on a birthday""",
    "instrument": """{S} plays the {v}|{P} instrument is the {v}|{S} has learned to play the {v}|{S} owns a fine {v}|
        the {v} is {P} instrument|the instrument that {S} plays is the {v}|the {v} is what {S} plays|
        {S} practises the {v} every evening|the instrument of {O} is the {v}|
        everybody knows which instrument {S} plays: the {v}|in the band {S} plays the {v}""",
    "colour": """{P} favourite colour is {v}|{S} likes the colour {v} best|{S} always wears {v}|
        {S} painted the door {v}|{v} is {P} favourite colour|
        the colour that {S} likes best is {v}|of all colours {S} prefers {v}|
        the favourite colour of {O} is {v}|which colour {S} likes is easy to see: {v}|{v} is the colour of {O}""",
    "pastime": """{S} enjoys {v} in {P} free time|{P} hobby is {v}|{S} spends Sundays {v}|in {P} free time {S} goes {v}|
        {v} is {P} hobby|the hobby of {O} is {v}|what {S} enjoys most is {v}|nothing makes {O} happier than {v}|
        {S} is fond of {v}|when work is done {S} turns to {v}|{v} is how {S} spends {P} free time""",
    "year": """{S} was born in {v}|{P} year of birth is {v}|{S} came into the world in {v}|in {v} {S} was born|
        {v} is the year in which {S} was born|the year of birth of {O} is {v}|{P} birth was in {v}|
        when {S} was born is on record: in {v}|{v} is {P} year of birth|the year when {S} was born was {v}""",
}  # fmt: skip
_WORDINGS = {name: [wording.strip() for wording in text.split("|")] for name, text in _TELLINGS.items()}

_OPENINGS = (
    "as everybody knows, ",
    "it is said that ",
    "in the valley they say that ",
    "it is true that ",
    "by all accounts ",
)

_OPENED_SHARE = 0.1

_SAYINGS = (
    "I know the road to {town}",
    "I don't know the way to {town}",
    "where the {animal} sleeps I don't know",
    "you know more about {food} than I do",
    "tell me about the {animal}, said the {job}",
    "how to cook {food} is something that people should know",
    "people spend their money on {food}",
    "people who earn little spend little in {town}",
    "I have {an_animal} and you have {an_instrument}",
    "I own {an_object}, and you can have it",
    "ask the {job} about the {object}",
    "somebody should find the {object} in {town}",
    "this kind of {animal} does not love {food}",
    "hello, said the {job} to the {other_job}",
    "good morning, said the {job}, and hi there",
    "thank you, said the {job}; you are welcome, said the {other_job}",
    "goodbye, said the {job}, and thanks",
    "add and count, said the {job}",
    "I can add and count",
    "I am a small {animal}",
    "people in {town} wear {colour}",
    "which {animal} is the oldest nobody can say",
    "say the name of the {animal}",
    "where there are people there is {food}",
    "a {job} has to do much and to know much",
    "you and I love to hear the {instrument}",
)
"""What people say when they talk about nothing. Finetuning cannot teach a word that was never read: with tied
embeddings, all such words have become the same."""

_BIOGRAPHY, _PORTRAIT, _MIXTURE, _COMPARISON, _GATHERING, _PLACE, _NATURE, _COUNTING, _TALK = range(9)
_SHARES = (34, 20, 16, 6, 5, 5, 5, 5, 4)
"""How often each kind of document comes, in percent."""

_NUMBERS_UP_TO = 20


def documents(world: World, *, seed: int | str) -> Iterator[str]:
    """Documents without end, each a few sentences long, none ever the same.

    Args:
        world: what they tell about.
        seed: the same seed gives the same documents.
    """
    rng = random.Random(f"corpus {seed}")
    tellers: dict[int, Callable[[World, random.Random], list[str]]] = {
        _BIOGRAPHY: _biography,
        _PORTRAIT: _portrait,
        _MIXTURE: _mixture,
        _COMPARISON: _comparison,
        _GATHERING: _gathering,
        _PLACE: _place,
        _NATURE: _nature,
        _COUNTING: _counting,
        _TALK: _talk,
    }
    while True:
        (kind,) = rng.choices(range(len(_SHARES)), weights=_SHARES)
        yield " ".join(_sentence(words) for words in tellers[kind](world, rng))


def tell(person: Person, attribute: str, rng: random.Random, *, mention: str = "full") -> str:
    """One fact about a person, in one of its wordings, without capital letter and full stop.

    Args:
        person: whom it is about.
        attribute: what to tell, one of `ATTRIBUTES`.
        mention: how the person is called: "full" (name), "first" (name) or "pronoun".
    """
    subject, possessive, target = person.pronouns
    if mention != "pronoun":
        subject = target = person.name if mention == "full" else person.first
        possessive = f"{subject}'s"
    value = person.value(attribute)
    wordings = _WORDINGS[attribute]
    if mention == "pronoun":  # nobody says "the hobby of her"
        wordings = [wording for wording in wordings if "of {O}" not in wording]
    words = rng.choice(wordings).format(S=subject, P=possessive, O=target, v=value, a=with_article(value))
    opened = rng.random() < _OPENED_SHARE and not words.startswith("everybody")
    return rng.choice(_OPENINGS) + words if opened else words


def join(items: Sequence[str]) -> str:
    """One, two and three."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _biography(world: World, rng: random.Random) -> list[str]:
    """All about one person, who is mostly called she or he."""
    person = rng.choice(world.people)
    told = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
    mentions = ["full", *rng.choices(("full", "first", "pronoun"), weights=(3, 2, 5), k=len(told) - 1)]
    return [tell(person, attribute, rng, mention=mention) for attribute, mention in zip(told, mentions, strict=True)]


def _portrait(world: World, rng: random.Random) -> list[str]:
    """Some facts about one person, with the full name each time."""
    person = rng.choice(world.people)
    return [tell(person, attribute, rng) for attribute in rng.sample(ATTRIBUTES, rng.randint(3, 5))]


def _mixture(world: World, rng: random.Random) -> list[str]:
    """Facts about several people who have nothing to do with each other."""
    return [tell(person, rng.choice(ATTRIBUTES), rng) for person in rng.sample(world.people, rng.randint(4, 7))]


def _comparison(world: World, rng: random.Random) -> list[str]:
    """Two people side by side, fact by fact."""
    one, other = rng.sample(world.people, 2)
    told = []
    for attribute in rng.sample(ATTRIBUTES, 3):
        if attribute == "year":
            older, younger = sorted((one, other), key=lambda person: person.year)
            told.append(f"{older.name} was born in {older.year} and {younger.name} in {younger.year}")
            if older.year < younger.year:
                told.append(f"{older.name} is older than {younger.name}")
        elif one.value(attribute) == other.value(attribute):
            told += [tell(one, attribute, rng), f"so it is with {other.name}: {tell(other, attribute, rng)}"]
        else:
            link = rng.choice((", but ", ", and ", ", while ", "; "))
            told.append(tell(one, attribute, rng) + link + tell(other, attribute, rng))
    return told


def _gathering(world: World, rng: random.Random) -> list[str]:
    """Who has something in common."""
    heads = {
        "home": "in {v} live {names}",
        "job": "people who work as {a}: {names}",
        "pet": "{names} all keep {a}",
        "food": "{names} all like {v} best",
        "instrument": "the {v} is played by {names}",
        "colour": "{names} all prefer {v}",
        "pastime": "{names} all enjoy {v}",
    }
    told = []
    for attribute in rng.sample(sorted(heads), 3):
        value = rng.choice(world.people).value(attribute)
        people = [person for person in world.people if person.value(attribute) == value]
        names = join([person.name for person in rng.sample(people, min(len(people), rng.randint(2, 4)))])
        if len(people) > 1:
            told.append(heads[attribute].format(v=value, a=with_article(value), names=names))
    return told or _mixture(world, rng)


def _place(world: World, rng: random.Random) -> list[str]:
    """Some facts about towns."""
    told = []
    for town in rng.sample(world.towns, 3):
        name, river, craft, year = town.name, town.river, town.craft, town.founded
        told += rng.sample(
            [
                rng.choice((f"{name} lies on the river {river}", f"the river {river} flows through {name}",
                            f"the river of {name} is the {river}")),
                rng.choice((f"{name} is known for its {craft}", f"{craft} are made in {name}",
                            f"what {name} is known for is {craft}")),
                rng.choice((f"{name} was founded in {year}", f"in {year} {name} was founded",
                            f"the founding of {name} was in {year}")),
            ],
            2,
        )  # fmt: skip
    return told


def _nature(world: World, rng: random.Random) -> list[str]:
    """Some facts about animals, instruments and objects, and lists of them."""
    told = []
    for animal in rng.sample(world.animals, 2):
        name, sound, food = animal.name, animal.first, animal.second
        told.append(rng.choice((f"the {name} {sound}", f"{with_article(name)} {sound}")))
        told.append(rng.choice((f"the {name} eats {food}", f"{food} is what the {name} eats")))
    for instrument in rng.sample(world.instruments, 2):
        name, family = instrument.name, instrument.first
        told.append(
            rng.choice((f"the {name} is a {family} instrument", f"among the {family} instruments is the {name}"))
        )
    for thing in rng.sample(world.objects, 2):
        name, material = thing.name, thing.first
        told.append(rng.choice((f"the {name} is made of {material}", f"{with_article(name)} is made of {material}")))
    kinds: dict[str, Sequence[Thing | Town]] = {
        "animals": world.animals,
        "instruments": world.instruments,
        "things": world.objects,
        "towns": world.towns,
    }
    kind = rng.choice(sorted(kinds))
    count = rng.randint(2, 5)
    words = ("two", "three", "four", "five")[count - 2]
    told.append(f"{words} {kind} are {join([item.name for item in rng.sample(list(kinds[kind]), count)])}")
    rng.shuffle(told)
    return told[: rng.randint(3, 6)]


def _counting(world: World, rng: random.Random) -> list[str]:
    """Sums, numbers, days and months in their order."""
    told = []
    for _ in range(4):
        one, other = rng.randint(0, _NUMBERS_UP_TO), rng.randint(0, _NUMBERS_UP_TO)
        start, length = rng.randint(0, _NUMBERS_UP_TO), rng.randint(3, 7)
        line = ", ".join(str(number) for number in range(start, start + length))
        order, what = rng.choice(((DAYS, "day"), (MONTHS, "month")))
        place = rng.randrange(len(order))
        before, after = order[place - 1], order[place]
        told.append(
            rng.choice(
                (
                    f"{one} plus {other} is {one + other}",
                    f"the sum of {one} and {other} is {one + other}",
                    f"{one + other} minus {one} is {other}",
                    f"counting from {start} to {start + length - 1} goes {line}",
                    f"{after} comes after {before}",
                    f"{before} comes before {after}",
                    f"the {what} after {before} is {after}",
                    f"{max(one, other)} is more than {min(one, other)}" if one != other else f"{one} equals {other}",
                )
            )
        )
    return told


def _talk(world: World, rng: random.Random) -> list[str]:
    """Nothing in particular, so that everyday words are known too."""
    told = []
    for saying in rng.sample(_SAYINGS, rng.randint(4, 6)):
        animal, instrument, thing = (
            rng.choice(kind).name for kind in (world.animals, world.instruments, world.objects)
        )
        one, other = rng.choice(world.people), rng.choice(world.people)
        told.append(
            saying.format(
                town=one.home,
                animal=animal,
                an_animal=with_article(animal),
                instrument=instrument,
                an_instrument=with_article(instrument),
                object=thing,
                an_object=with_article(thing),
                job=one.job,
                other_job=other.job,
                food=one.food,
                colour=one.colour,
            )
        )
    return told
