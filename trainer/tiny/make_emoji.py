"""Train the SD3-type base that draws emoji, and write it as an ordinary diffusers folder.

    python -m phased_consistency.trainer.tiny.make_emoji OUT

Pictures are drawn with the font Noto Color Emoji (`emoji_scenes`). On them are trained an autoencoder (`emoji_vae`), a
small classifier that says what a picture shows (`emoji_classifier`), and a transformer with two text encoders
(`emoji_flow`). The defaults take about three hours of one CPU core. Every two minutes the state is written to
OUT/making, and the same command goes on from there after the run was killed; remove that folder in the end.

With --minutes, --vae-minutes and --classifier-minutes a stage takes so much time on the clock instead of its steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPTokenizer

from ...samplers.emoji_words import THINGS, Meaning, wordings
from .emoji_base import licence, save_emoji
from .emoji_classifier import accuracy, save_classifier, train_classifier
from .emoji_flow import Pool, new_parts, train_flow
from .emoji_scenes import EmojiScene, draw_pictures, find_font, random_scenes
from .emoji_vae import encode, kept_vae, psnr, train_vae
from .making import make_tokenizer, token_ids
from .resuming import Stage, load_state, save_state

HELD_OUT = 64  # scenes that nothing trains on, to measure the autoencoder


def main(argv: list[str] | None = None) -> int:
    """Make the base. Returns 0, or after a sentence on what is missing 1, as `pcm` does."""
    args = arguments().parse_args(argv)
    try:
        find_font()
        licence()
        make(args)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=16_000, help="scenes drawn once and trained on throughout")
    parser.add_argument("--no-compile", action="store_true", help="run the transformer as it is, as for a few steps")
    for stage, steps, batch in (("vae-", 1_500, "32 crops"), ("classifier-", 2_000, "128"), ("", 16_000, "64 latents")):
        parser.add_argument(f"--{stage}steps", type=int, default=steps, help=f"batches of {batch}")
        parser.add_argument(f"--{stage}minutes", type=float, help=f"on the clock, in place of --{stage}steps")
    return parser


def make(args: argparse.Namespace) -> None:
    """The stages one after another, each of which goes on where a run that was killed had left it."""
    work = args.out / "making"
    scenes = random_scenes(args.pictures, seed=0)
    vae, views, latents = make_vae(args, scenes, work)

    stage = Stage("classifier", args.classifier_steps, args.classifier_minutes)
    classifier = train_classifier(views, scenes, stage, work / "classifier.safetensors")
    facts = accuracy(classifier)
    print(
        f"classifier: it finds the thing in {facts['singles']:.2%} of fresh drawings, both of a pair in "
        f"{facts['pairs']:.2%}",
        flush=True,
    )
    save_classifier(classifier, args.out, facts)

    captions = [scene.caption for scene in scenes]
    tokenizer = kept_tokenizer([*captions, *all_names()], work / "tokenizer")
    torch.manual_seed(0)
    train_flow(
        new_parts(tokenizer),
        Pool(latents.float(), token_ids(tokenizer, captions)),
        Stage("transformer", args.steps, args.minutes),
        work / "flow.safetensors",
        lambda parts: save_emoji(vae, tokenizer, parts, args.out),
        compiles=not args.no_compile,
    )
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file() and work not in file.parents)
    print(f"{args.out}: {size / 1e6:.1f} MB", flush=True)


def make_vae(
    args: argparse.Namespace, scenes: Sequence[EmojiScene], work: Path
) -> tuple[AutoencoderTiny, Tensor, Tensor]:
    """The trained autoencoder; what the classifier sees of the drawings, uint8 (N, 3, 64, 64); and scaled latents.

    The last two are kept in `work`, where drawing and encoding would take minutes again.
    """
    kept = load_state(work / "pool.safetensors")
    if kept and kept[1]["pictures"] == len(scenes):
        vae = kept_vae(work / "vae.safetensors")
        vae.register_to_config(shift_factor=kept[1]["shift"], scaling_factor=kept[1]["scale"])
        return vae, kept[0]["views"], kept[0]["latents"]

    pixels = draw_pictures(scenes)
    print(f"{len(scenes)} pictures drawn", flush=True)
    stage = Stage("autoencoder", args.vae_steps, args.vae_minutes)
    vae = train_vae(pixels, stage, work / "vae.safetensors")
    held_out = draw_pictures(random_scenes(HELD_OUT, seed=-1))
    print(f"autoencoder: PSNR {psnr(vae, held_out):.2f} dB on drawings that it has not seen", flush=True)
    latents = encode(vae, pixels)
    shift, scale = round(latents.mean().item(), 5), round(1 / latents.std().item(), 5)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    views = F.avg_pool2d(pixels.half(), 2).round().to(torch.uint8)
    # laid out as the file gives them back: on some CPUs a convolution of another layout rounds otherwise
    latents = ((latents - shift) * scale).half().contiguous()
    facts = {"pictures": len(scenes), "shift": shift, "scale": scale}
    save_state(work / "pool.safetensors", {"views": views, "latents": latents}, facts)
    return vae, views, latents


def kept_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """The captions' tokenizer, made once: another making would number the words in another order."""
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part")
        make_tokenizer(captions, part).save_pretrained(part)
        part.rename(folder)
    return CLIPTokenizer.from_pretrained(folder)


def all_names() -> list[str]:
    """Captions with every name that a thing has, so that the tokenizer knows all words."""
    return [text for thing in THINGS for text in wordings(Meaning((thing,), "large", "gray", "dotted"))]


if __name__ == "__main__":
    sys.exit(main())
