"""The languages of the bundled bases: prompts that none of them was trained on, and whether pictures show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...samplers.emoji_words import parse
from . import emoji_scenes, scenes
from .bundled import EMOJI, bundled_folder
from .emoji_classifier import Classifier, agreement, load_classifier
from .scenes import DrawScene


@dataclass(frozen=True)
class Language:
    """What a bundled base can be asked for.

    draw_scene: a random scene, with its caption. shows: for prompts and as many pictures (N, 3, H, W) in [0, 1],
    whether each picture shows what its prompt names, bool (N). features: (N, D) of such pictures, by which sets of
    them are compared; None where nothing was trained for that.
    """

    draw_scene: DrawScene
    shows: Callable[[Sequence[str], Tensor], Tensor]
    features: Callable[[Tensor], Tensor] | None = None

    def held_out(self, number: int, trained_on: set[str]) -> list[str]:
        """The captions of `held_out_scenes`."""
        return [scene.caption for scene in scenes.held_out_scenes(number, trained_on, self.draw_scene)]


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


SHAPES = Language(scenes.random_scene, _show_colours)
THINGS = Language(emoji_scenes.random_scene, _show_things, lambda pictures: _classifier().features(pictures * 2 - 1))
