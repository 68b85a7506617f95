"""A small world made from a seed: the people of a valley, its towns, animals, instruments and things.

Everything that the embedded model ever reads is about this world, so that every answer it gives can be checked. The
corpus (`corpus`) tells it in declarative sentences; the conversations (`chat`) ask about it.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

__all__ = ["ATTRIBUTES", "DAYS", "MONTHS", "Person", "Thing", "Town", "World", "make_world", "with_article"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_WOMEN = _words(
    """Ada Agnes Alma Anna Beata Bella Carla Clara Cora Daria Dora Edith Elena Elsa Emma Erika Eva Flora Freya Greta
    Hanna Helga Ida Ines Iris Jana Julia Karin Lena Lina Lotta Mara Marta Mila Nadia Nina Nora Olga Paula Rosa"""
)
_MEN = _words(
    """Adam Albert Anton Arthur Axel Bruno Carl Cyril Daniel David Edgar Emil Erik Felix Frank Fritz Georg Gustav Hans
    Hugo Igor Ivan Jakob Jonas Karl Konrad Leo Lukas Magnus Max Niels Oscar Otto Pavel Peter Ralf Robert Samuel Theo
    Viktor"""
)
_SURNAMES = _words(
    """Abel Amberg Ashdown Barlow Becker Bell Berg Birch Bloom Brandt Brook Carver Castle Clement Conrad Cooper Crane
    Dahl Dale Decker Drake Eastman Ebner Elling Falk Farrow Fenn Fielding Finch Fisher Forster Frost Gable Garner
    Glover Grant Graves Hale Hammer Harper Hartley Hayes Heller Hill Holm Hooper Hunt Jansen Keller Kern Kimball
    Lake Lang Larkin Linde Lund Marsh Mason Meadow Mercer Miller Moor Nash Noble North Oakes Palmer Pell Porter
    Quill Reed Ridge Rowe Sanders Sharp Stone Thorne Vogel Walker Winter"""
)
_FOREIGN = (
    _words("Bo Da Fa Ga Ja Ko La Mo Nu Pi Qua Ri Sza Tu Vo Wi Xi Yo Za Zu"),
    _words("bek cic dorf gora hara kov lund mura nez puri quist rossi shima tani ulu vec wicz xen yama zek"),
)
"""Beginnings and ends of surnames that nobody in the valley bears."""
_TOWNS = _words(
    """Aldmoor Bramford Coldwell Dunmere Elmstead Fernby Glenrock Harwick Ivelton Kestrel Larchfield Millbrook Norwick
    Oakham Penridge Quarley Rosedale Stonebury Tarnside Umberley Westholm Yarrow"""
)
_RIVERS = ("Alder", "Brenn", "Calder", "Dove", "Esk", "Tamsin")
_CRAFTS = _words(
    """bells boats bread candles carpets cheese clocks glass honey knives paper pottery ropes salt shoes wool"""
)

_JOBS = _words(
    """baker barber carpenter doctor farmer gardener glazier judge librarian mechanic miller nurse painter pilot potter
    shepherd tailor teacher weaver writer"""
)
_PASTIMES = _words(
    """climbing cooking cycling dancing diving drawing fishing hiking knitting painting reading riding rowing running
    sailing skating singing swimming"""
)
_FOODS = """apple pie|bean soup|beetroot|cherry jam|dumplings|fried fish|goat cheese|lentil stew|mushrooms|noodles|
onion bread|pancakes|pea soup|plum cake|porridge|potato salad|pumpkin|rice pudding|roast chicken|walnuts"""
_COLOURS = _words("black blue brown green grey orange pink purple red white yellow")

_ANIMALS = _words(
    """cat:purrs:fish dog:barks:meat duck:quacks:weeds fox:yelps:mice frog:croaks:flies goat:bleats:leaves
    goose:honks:grass hamster:squeaks:seeds hare:squeals:clover horse:neighs:hay mouse:peeps:grain owl:hoots:voles
    parrot:talks:nuts pig:grunts:acorns raven:caws:berries sheep:baas:herbs"""
)
_INSTRUMENTS = _words(
    """accordion:keyed banjo:string bassoon:wind bugle:brass cello:string clarinet:wind cornet:brass drum:beaten
    fiddle:string flute:wind gong:beaten guitar:string harp:string lute:string oboe:wind organ:keyed piano:keyed
    trombone:brass trumpet:brass tuba:brass"""
)
_OBJECTS = _words(
    """anvil:iron barrel:oak bottle:glass bowl:clay bucket:tin candle:wax coin:silver cup:clay key:iron mirror:glass
    nail:iron ring:gold rope:hemp sail:linen scarf:wool spoon:wood table:oak window:glass"""
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

ATTRIBUTES = ("home", "job", "pet", "food", "instrument", "colour", "pastime", "year")
"""What is known of every person; the names of `Person`'s fields."""


@dataclass(frozen=True)
class Person:
    """Somebody who lives in the valley. `year` is the year of birth."""

    first: str
    last: str
    female: bool
    home: str
    job: str
    pet: str
    food: str
    instrument: str
    colour: str
    pastime: str
    year: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    @property
    def pronouns(self) -> tuple[str, str, str]:
        """Subject, possessive, object."""
        return ("she", "her", "her") if self.female else ("he", "his", "him")

    def value(self, attribute: str) -> str:
        """What is known of this person, one of `ATTRIBUTES`."""
        return str(getattr(self, attribute))


@dataclass(frozen=True)
class Town:
    """A town: the river it lies on, what it makes, the year it was founded in."""

    name: str
    river: str
    craft: str
    founded: str


@dataclass(frozen=True)
class Thing:
    """An animal, an instrument or an object, with what is known of its kind.

    `first` and `second` are the sound and the food of an animal, the family of an instrument, the material of an
    object.
    """

    name: str
    first: str
    second: str = ""


@dataclass(frozen=True)
class World:
    """All there is. `strangers` are people of whom nothing is known: nobody in the valley bears their surnames."""

    people: tuple[Person, ...]
    towns: tuple[Town, ...]
    animals: tuple[Thing, ...]
    instruments: tuple[Thing, ...]
    objects: tuple[Thing, ...]
    strangers: tuple[str, ...]


def make_world(seed: int = 0, *, people: int = 200, strangers: int = 200) -> World:
    """The world of a seed.

    Args:
        seed: another seed gives every person and town other properties.
        people: how many live in it, at most 6,000.
        strangers: how many names that nobody bears are given, at most 400.
    """
    rng = random.Random(f"world {seed}")
    names = list(itertools.product([*_WOMEN, *_MEN], _SURNAMES))
    rng.shuffle(names)
    foreign = [beginning + end for beginning, end in itertools.product(*_FOREIGN)]
    random.Random(f"strangers {seed}").shuffle(foreign)
    women = set(_WOMEN)
    foods = [food.strip() for food in _FOODS.split("|")]
    animals = [Thing(*entry.split(":")) for entry in _ANIMALS]
    instruments = [Thing(*entry.split(":")) for entry in _INSTRUMENTS]
    inhabitants = tuple(
        Person(
            first=first,
            last=last,
            female=first in women,
            home=rng.choice(_TOWNS),
            job=rng.choice(_JOBS),
            pet=rng.choice(animals).name,
            food=rng.choice(foods),
            instrument=rng.choice(instruments).name,
            colour=rng.choice(_COLOURS),
            pastime=rng.choice(_PASTIMES),
            year=str(rng.randrange(1940, 2010)),
        )
        for first, last in names[:people]
    )
    towns = tuple(
        Town(name, rng.choice(_RIVERS), rng.choice(_CRAFTS), str(rng.randrange(1100, 1900))) for name in _TOWNS
    )
    return World(
        people=inhabitants,
        towns=towns,
        animals=tuple(animals),
        instruments=tuple(instruments),
        objects=tuple(Thing(*entry.split(":")) for entry in _OBJECTS),
        strangers=tuple(f"{rng.choice(names)[0]} {surname}" for surname in foreign[:strangers]),
    )


def with_article(noun: str) -> str:
    """A cat, an owl."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
