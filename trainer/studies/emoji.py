"""An emoji base by its classifier: how often its pictures show what their prompts name.

    python -m phased_consistency.trainer.studies.emoji FOLDER [--sheet OUT.png]

Prints, for single prompts and for pairs, the share that agrees in several numbers of steps and guidances, each with a
95 % interval, and what the classifier says of drawings and of their way through the autoencoder, which is the most
that any base could reach.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from ...samplers.emoji_words import GROUNDS, PATTERNS, SIZES, THINGS, Meaning, parse, wordings
from ...samplers.phases import count_steps
from ..evaluation.intervals import mean_of
from ..evaluation.setting import TEACHER, Setting
from ..evaluation.trial import Trial
from ..families import Base, load_base
from ..pictures import save_image, sheet, to_image
from ..tiny.emoji_classifier import Classifier, agreement, load_classifier, scaled
from ..tiny.emoji_scenes import draw_pictures, random_scenes
from ..tiny.emoji_vae import encode, psnr

# Euler takes the levels of diffusers' and ComfyUI's usual samplers; DDIM those of the demo, which suit few steps.
SETTINGS = (
    Setting(TEACHER, 25, 4.0, solver="euler"),
    Setting(TEACHER, 40, 4.0, solver="euler"),
    Setting(TEACHER, 4, 1.0, solver="euler"),
    Setting(TEACHER, 4, 4.0, solver="euler"),
    Setting(TEACHER, 4, 1.0),
    Setting(TEACHER, 4, 4.0),
)
SHOWN = 96  # pictures on the sheet


def main(argv: list[str] | None = None) -> None:
    """Print the table and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--singles", type=int, default=168, help="prompts that name one thing")
    parser.add_argument("--pairs", type=int, default=84, help="prompts that name two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="where to save guided pictures, of singles and of pairs")
    args = parser.parse_args(argv)

    base, classifier = load_base(str(args.folder)), load_classifier(args.folder)
    measure_drawings(base, classifier)
    prompts = dict(zip(("singles", "pairs"), measured_prompts(args.singles, args.pairs, args.seed), strict=True))
    for number, setting in enumerate(SETTINGS):
        line, together = [f"{setting.who}, {count_steps(setting.steps)}, guidance {setting.guidance:g}:"], []
        for kind, texts in prompts.items():
            trial = Trial.of(base, texts, args.seed + number)
            pictures = base.decode(trial.latents(setting, base))
            together.append(agreement(classifier, 2 * pictures - 1, [parse(text) for text in texts]))
            line.append(f"{kind} {rated(together[-1])}")
            if number == 0 and args.sheet:
                path = args.sheet.with_stem(f"{args.sheet.stem}-{kind}")
                save_image(to_image(sheet(pictures[:SHOWN])[0]), path)
        print("  ".join([*line, f"together {rated(torch.cat(together))}"]), flush=True)
        missed = [text for text, met in zip(prompts["singles"], together[0].tolist(), strict=True) if not met]
        if setting.guidance != 1:
            print(f"  missed: {'; '.join(missed)}", flush=True)


def measure_drawings(base: Base, classifier: Classifier) -> None:
    """Print what the classifier says of drawings, and of what the autoencoder makes of them."""
    for kind, share in (("singles", 0.0), ("pairs", 1.0)):
        scenes = random_scenes(200, seed=-3, pairs=share)
        meanings = [Meaning(tuple(spot.thing for spot in scene.spots)) for scene in scenes]
        pixels = draw_pictures(scenes)
        with torch.no_grad():
            again = base.vae.decoder(encode(base.vae, pixels)).clamp(-1, 1)
        drawn, rebuilt = (rated(agreement(classifier, x, meanings)) for x in (scaled(pixels), again))
        quality = psnr(base.vae, pixels)
        print(f"{kind}: drawings {drawn}, through the autoencoder, {quality:.1f} dB, {rebuilt}", flush=True)


def measured_prompts(singles: int, pairs: int, seed: int) -> tuple[list[str], list[str]]:
    """Prompts that name one thing, each thing equally often, and prompts that name two, in their fullest wording."""
    rng = random.Random(f"measured {seed}")
    things, grounds = list(THINGS), list(GROUNDS)

    def ground() -> tuple[str, str]:
        return rng.choice(grounds), rng.choice(PATTERNS) if rng.random() < 0.2 else ""

    ones = [Meaning((things[i % len(things)],), rng.choice(SIZES), *ground()) for i in range(singles)]
    twos = [Meaning(tuple(rng.sample(things, 2)), "", *ground()) for _ in range(pairs)]
    return [wordings(meaning)[0] for meaning in ones], [wordings(meaning)[0] for meaning in twos]


def rated(met: Tensor) -> str:
    """A share in percent with its 95 % interval (Wilson's): "97.6 [94.0, 99.1] %"."""
    return f"{mean_of(met) * 100:.1f} %"


if __name__ == "__main__":
    main()
