"""Captions of tags: several variants of each, shuffled and with some left out, made once and encoded once."""

from __future__ import annotations

import random
from typing import NamedTuple

from ..config.sections import DataConfig


class Tags(NamedTuple):
    """How captions of tags, with commas between, become several.

    variants: how many are made of each. keep: the first tags, which stay in place. drop: the share of the others that a
    variant goes without.
    """

    variants: int
    keep: int
    drop: float

    @classmethod
    def of(cls, data: DataConfig) -> Tags | None:
        """The settings of a run, None where captions stay as they are."""
        return cls(data.tag_variants, data.keep_tags, data.drop_tags) if data.tag_variants else None

    def varied(self, caption: str) -> list[str]:
        """A caption's variants, each once, in a fixed order: the same on every machine, whatever else there is.

        A caption without tags to move is its only variant.
        """
        tags = [tag for part in caption.split(",") if (tag := part.strip())]
        kept, others = tags[: self.keep], tags[self.keep :]
        if len(others) < 1 or (len(others) == 1 and not self.drop):
            return [caption]

        variants = []
        for number in range(self.variants):
            rng = random.Random(f"{number} {caption}")
            moved = [tag for tag in others if rng.random() >= self.drop]
            rng.shuffle(moved)
            variants.append(", ".join(kept + moved) or caption)
        return list(dict.fromkeys(variants))
