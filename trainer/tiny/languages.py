"""The languages of the bundled bases: prompts that none of them was trained on, and whether pictures show them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice

import torch
from torch import Tensor

from ...samplers.emoji_words import parse
from . import emoji_scenes, scenes
from .bundled import EMOJI, bundled_folder
from .emoji_classifier import Classifier, agreement, load_classifier


@dataclass(frozen=True)
class Language:
    """What a bundled base can be asked for.

    caption: of a random scene. shows: for prompts and as many pictures (N, 3, H, W) in [0, 1], whether each picture
    shows what its prompt names, bool (N). meaning: how that is judged, for a report. features: (N, D) of such
    pictures, by which sets of them are compared; None where nothing was trained for that.
    """

    caption: Callable[[random.Random], str]
    shows: Callable[[Sequence[str], Tensor], Tensor]
    meaning: str
    features: Callable[[Tensor], Tensor] | None = None

    def held_out(self, number: int, trained_on: set[str]) -> list[str]:
        """The first `number` captions of an endless random list that are no training prompts."""
        rng = random.Random("held out")
        captions = (self.caption(rng) for _ in count())
        return list(islice((caption for caption in captions if caption not in trained_on), number))


def language_of(base: str) -> Language | None:
    """The language of a bundled base, by its name; None for any other base."""
    if bundled_folder(base) is None:
        return None
    return THINGS if base == EMOJI else SHAPES


def _show_colours(prompts: Sequence[str], pictures: Tensor) -> Tensor:
    return torch.tensor([scenes.follows_prompt(*pair) for pair in zip(prompts, pictures, strict=True)])


def _show_things(prompts: Sequence[str], pictures: Tensor) -> Tensor:
    return agreement(_classifier(), pictures * 2 - 1, [parse(prompt) for prompt in prompts])


@cache
def _classifier() -> Classifier:
    """The emoji base's classifier, which is in its folder."""
    return load_classifier(bundled_folder(EMOJI))


SHAPES = Language(
    lambda rng: scenes.random_scene(rng).caption,
    _show_colours,
    "the ground and every shape in the colours that the prompt names",
)
THINGS = Language(
    lambda rng: emoji_scenes.random_scene(rng).caption,
    _show_things,
    "the thing that the prompt names, or both, each on its side, by the base's classifier",
    lambda pictures: _classifier().features(pictures * 2 - 1),
)
