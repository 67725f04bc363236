"""The emoji base's language: the things that it draws, the wordings of a prompt, and what a prompt means.

A prompt names one thing, "a large fox on a striped blue background", or two, "a fox left of a moon on a black
background". Several wordings mean the same: a thing has other names ("fox face"), the articles and the word
"background" may be left out ("fox on blue"), and a pair may be said from its other end ("a moon right of a fox").
`parse` reads them all; `wordings` lists them; `caption` picks one as the training does.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

# thing -> its character in the font, and its other names
THINGS = {
    "apple": ("🍎", "red apple"),
    "orange": ("🍊", "tangerine"),
    "lemon": ("🍋",),
    "pear": ("🍐",),
    "banana": ("🍌",),
    "grapes": ("🍇",),
    "watermelon": ("🍉",),
    "strawberry": ("🍓",),
    "cherries": ("🍒", "cherry"),
    "pineapple": ("🍍",),
    "carrot": ("🥕",),
    "eggplant": ("🍆", "aubergine"),
    "avocado": ("🥑",),
    "mushroom": ("🍄", "toadstool"),
    "cheese": ("🧀",),
    "pizza": ("🍕", "pizza slice"),
    "burger": ("🍔", "hamburger"),
    "fries": ("🍟", "french fries"),
    "donut": ("🍩", "doughnut"),
    "cookie": ("🍪",),
    "coffee": ("☕", "coffee cup"),
    "ice cream": ("🍦",),
    "cat": ("🐱", "cat face"),
    "dog": ("🐶", "dog face"),
    "fox": ("🦊", "fox face"),
    "bear": ("🐻", "bear face"),
    "panda": ("🐼", "panda face"),
    "koala": ("🐨", "koala face"),
    "tiger": ("🐯", "tiger face"),
    "lion": ("🦁", "lion face"),
    "cow": ("🐮", "cow face"),
    "pig": ("🐷", "pig face"),
    "frog": ("🐸", "frog face"),
    "monkey": ("🐵", "monkey face"),
    "chick": ("🐤",),
    "penguin": ("🐧",),
    "owl": ("🦉",),
    "unicorn": ("🦄",),
    "bee": ("🐝", "honeybee"),
    "ladybug": ("🐞", "ladybird"),
    "butterfly": ("🦋",),
    "octopus": ("🐙",),
    "fish": ("🐠",),
    "crab": ("🦀",),
    "cactus": ("🌵",),
    "pine tree": ("🌲", "fir tree"),
    "palm tree": ("🌴",),
    "sunflower": ("🌻",),
    "rose": ("🌹", "red rose"),
    "tulip": ("🌷",),
    "clover": ("🍀", "shamrock"),
    "earth": ("🌍", "globe"),
    "moon": ("🌙", "crescent moon"),
    "star": ("⭐",),
    "sun": ("☀",),
    "rainbow": ("🌈",),
    "lightning": ("⚡",),
    "fire": ("🔥", "flame"),
    "water drop": ("💧",),
    "car": ("🚗", "red car"),
    "airplane": ("✈", "plane"),
    "rocket": ("🚀",),
    "sailboat": ("⛵",),
    "soccer ball": ("⚽",),
    "basketball": ("🏀",),
    "balloon": ("🎈",),
    "gift": ("🎁", "present"),
    "guitar": ("🎸",),
    "camera": ("📷",),
    "light bulb": ("💡",),
    "key": ("🔑",),
    "bell": ("🔔",),
    "alarm clock": ("⏰",),
    "crown": ("👑",),
    "gem": ("💎", "diamond"),
    "heart": ("❤", "red heart"),
    "robot": ("🤖", "robot face"),
    "alien": ("👽", "alien face"),
    "pumpkin": ("🎃",),
    "happy face": ("😀", "smiling face"),
    "angry face": ("😡",),
    "cool face": ("😎", "sunglasses face"),
    "umbrella": ("☂",),
    "target": ("🎯", "bullseye"),
}
GROUNDS = {
    "white": (245, 245, 242),
    "black": (24, 24, 28),
    "blue": (70, 130, 220),
    "green": (80, 170, 90),
    "pink": (245, 150, 190),
    "yellow": (250, 215, 90),
    "gray": (150, 150, 155),
    "purple": (130, 80, 180),
}
PATTERNS = ("", "striped", "dotted", "checkered")
SIZES = ("", "large")
WORDS_FOR = {"large": ("large", "big"), "gray": ("gray", "grey")}  # a word of the language -> all that say it
EXAMPLES = "a large fox on a blue background", "a rocket left of a moon on a striped black background"

ARTICLES = {"a", "an", "the"}
NAMES = {name: thing for thing, (_, *others) in THINGS.items() for name in (thing, *others)}
SAID = {word: meant for meant, words in WORDS_FOR.items() for word in words}


@dataclass(frozen=True)
class Meaning:
    """What a prompt says, and no more: all that it leaves out may be anything.

    things: one, or two from left to right. size: "" or "large", of one thing only. ground: a colour; "" where the
    prompt has none. pattern: the ground's, "" for a plain one.
    """

    things: tuple[str, ...]
    size: str = ""
    ground: str = ""
    pattern: str = ""


def parse(text: str) -> Meaning:
    """What a prompt means; the empty one means no thing at all, as a negative prompt does.

    Raises ValueError, with the nearest words that the base knows, a line for each thing and ground that it does not.
    """
    words = [SAID.get(word, word) for word in re.findall(r"[^\W_]+", text.lower()) if word not in ARTICLES]
    if not words:
        return Meaning(())
    subject, _, ground = " ".join(words).partition(" on ")
    first, relation, second = re.fullmatch(r"(.*?)(?: (left|right) of (.*))?", subject).groups()
    size = "large" if first.startswith("large ") and not relation else ""
    names = (first.removeprefix(size).strip(),)
    if relation:
        names = (first, second) if relation == "left" else (second, first)
    *things, (pattern, colour) = _read_all([*(partial(_thing, name) for name in names), partial(_ground, ground)])
    return Meaning(tuple(things), size, colour, pattern)


def _read_all(readers: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of these gives. Raises ValueError with the sentences of all that raise one, a line each."""
    results = []
    faults = []
    for read in readers:
        try:
            results.append(read())
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return results


def _thing(name: str) -> str:
    """The thing of this name. Raises ValueError, with the nearest names, for one that the base does not draw."""
    if name in NAMES:
        return NAMES[name]
    near = ", ".join(difflib.get_close_matches(name, NAMES, n=3, cutoff=0))
    raise ValueError(
        f"The base does not draw '{name}'. Nearest are: {near}. It draws {len(THINGS)} things, each alone or two side "
        f"by side: {EXAMPLES[0]}; {EXAMPLES[1]}."
    )


def _ground(words: str) -> tuple[str, str]:
    """(pattern, colour) of a ground, both "" for none. Raises ValueError, with the known ones, for any other."""
    if not words:
        return "", ""
    words = words.removesuffix(" background")
    *pattern, colour = words.split()
    if colour in GROUNDS and " ".join(pattern) in PATTERNS:
        return " ".join(pattern), colour
    raise ValueError(
        f"The base has no ground '{words}'. It has {', '.join(GROUNDS)}; each may be {', '.join(PATTERNS[1:])}: "
        f"{EXAMPLES[1]}."
    )


def wordings(meaning: Meaning) -> list[str]:
    """Every wording of a meaning, the fullest with the first names first: lower case, without commas."""
    forms = [
        (articles, names, side, size, background)
        for background, articles, side, size, names in product(
            (" background", ""),
            (True, False),
            ("left", "right") if len(meaning.things) == 2 else ("left",),
            WORDS_FOR.get(meaning.size, ("",)),
            product(*((thing, *THINGS[thing][1:]) for thing in meaning.things)),
        )
        if articles or not background
    ]
    return list(dict.fromkeys(_worded(meaning, *form) for form in forms))


def caption(meaning: Meaning, rng: random.Random) -> str:
    """A wording as the training reads it: three in four of the fullest form, with any names; else any wording."""
    every = wordings(meaning)
    if rng.random() < 0.25:
        return rng.choice(every)
    full = [text for text in every if text.endswith("background") or not meaning.ground]
    return rng.choice(full)


def _worded(meaning: Meaning, articles: bool, names: Sequence[str], side: str, size: str, background: str) -> str:
    """One wording: with or without articles, by these names, from this side, with this word for the size."""
    nouns = [f"{size} {name}".strip() for name in names]
    if articles:
        nouns = [_article(noun) for noun in nouns]
    subject = f" {side} of ".join(nouns if side == "left" else reversed(nouns))
    if not meaning.ground:
        return subject
    ground = f"{meaning.pattern} {meaning.ground}".strip() + background
    return f"{subject} on {_article(ground) if background else ground}"


def _article(noun: str) -> str:
    """The noun with "a" or "an"; several of a kind ("grapes") get none."""
    if noun.split()[-1] in {"grapes", "cherries", "fries"}:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
