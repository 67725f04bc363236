"""The emoji base as a folder: written whole with its licence and its prompts, loaded, and drawn with.

It is an ordinary diffusers folder, which `trainer.families` loads as any SD3. `EmojiBase` draws with it without the
rest of the trainer, and refuses prompts and sizes that it has not learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ...samplers.emoji_words import parse
from .emoji_scenes import PACKAGE, SIDE, check_side, random_scene
from .emoji_vae import decode
from .making import bf16, encode_words, token_ids, write_vocabulary
from .sd3_parts import CONTEXT, new_pipeline

COPYRIGHT = Path("/usr/share/doc") / PACKAGE / "copyright"  # Debian's file, with the licence's text
LICENCE, ATTRIBUTION = "OFL-1.1.txt", "ATTRIBUTION.txt"
PROMPTS = 512  # to distil from
AT_ONCE = 64  # pictures in a batch


@dataclass
class EmojiBase:
    """The loaded parts, in fp32. parts: the transformer, then its two text encoders."""

    parts: nn.ModuleList
    vae: AutoencoderTiny
    tokenizer: CLIPTokenizer
    scheduler: FlowMatchEulerDiscreteScheduler

    @classmethod
    def load(cls, folder: Path) -> EmojiBase:
        """The base in a folder. Raises OSError where it is not whole."""

        def part(kind: type[nn.Module], name: str) -> nn.Module:
            return kind.from_pretrained(folder / name, torch_dtype=torch.float32).eval().requires_grad_(False)

        encoders = [part(CLIPTextModelWithProjection, name) for name in ("text_encoder", "text_encoder_2")]
        return cls(
            nn.ModuleList([part(SD3Transformer2DModel, "transformer"), *encoders]),
            part(AutoencoderTiny, "vae").to(memory_format=torch.channels_last),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        )

    def draw(
        self, prompts: Sequence[str], steps: int = 25, guidance: float = 4.0, seed: int = 0, side: int = SIDE
    ) -> Tensor:
        """Pictures (N, 3, side, side) in [-1, 1], one of each prompt, with the negative prompt empty.

        guidance: 1 is none. Raises ValueError for words that the base does not know, and for a side that it does not
        draw.
        """
        check_side(side)
        for prompt in prompts:
            parse(prompt)
        noise = torch.randn(len(prompts), 16, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
        chunks = range(0, len(prompts), AT_ONCE)
        latents = [self._sample(noise[i : i + AT_ONCE], prompts[i : i + AT_ONCE], steps, guidance) for i in chunks]
        return decode(self.vae, torch.cat(latents))

    @torch.no_grad()
    def _sample(self, latents: Tensor, prompts: Sequence[str], steps: int, guidance: float) -> Tensor:
        """Scaled latents from noise, in Euler's steps along the schedule."""
        context, pooled = self._encode(prompts, guided=guidance != 1)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            inputs = latents.repeat(len(context) // len(latents), 1, 1, 1)
            with bf16():
                flow = self.parts[0](inputs, context, pooled, t.expand(len(inputs))).sample.float()
            if guidance != 1:
                with_prompt, without = flow.chunk(2)
                flow = without + guidance * (with_prompt - without)
            latents = self.scheduler.step(flow, t, latents).prev_sample
        return latents

    def _encode(self, prompts: Sequence[str], guided: bool) -> tuple[Tensor, Tensor]:
        """Context (B, 77, 4096) and pooled (B, 2048) of the prompts and, to be guided, as often of the empty one."""
        ids = token_ids(self.tokenizer, [*prompts])
        ids = torch.cat([ids[:-1], ids[-1:].expand(len(prompts), -1)]) if guided else ids[:-1]
        states, pooled = zip(*(encode_words(encoder, ids) for encoder in self.parts[1:]), strict=True)
        context = torch.cat(states, -1)
        return F.pad(context, (0, CONTEXT - context.shape[-1])), torch.cat(pooled, -1)


def save_emoji(vae: AutoencoderTiny, tokenizer: CLIPTokenizer, parts: nn.ModuleList, folder: Path) -> None:
    """Write the diffusers folder in fp16, with prompts to distil from, licence and attribution.

    Raises FileNotFoundError where Debian's package of the font, which has the licence's text, is not installed.
    """
    text = licence()
    halved = [deepcopy(part).half() for part in (vae, *parts)]
    new_pipeline(halved[0], tokenizer, *halved[1:]).save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        write_vocabulary(tokenizer, folder / name)
    comment = f"# Captions of random scenes, the language of this base (emoji_base.some_prompts({PROMPTS}, seed=1)).\n"
    (folder / "prompts.txt").write_text(comment + "\n".join(some_prompts(PROMPTS, 1)) + "\n", encoding="utf-8")
    (folder / LICENCE).write_text(text, encoding="utf-8")
    (folder / ATTRIBUTION).write_text(CREDIT, encoding="utf-8")


def some_prompts(number: int, seed: int) -> list[str]:
    """`number` different captions of random scenes; the same seed gives the same list."""
    rng = random.Random(f"emoji prompts {seed}")
    captions: dict[str, None] = {}
    while len(captions) < number:
        captions[random_scene(rng).caption] = None
    return list(captions)


def licence() -> str:
    """The SIL Open Font License 1.1 as Debian's package of the font has it, with its copyright lines.

    Raises FileNotFoundError, naming the package, where it is not installed.
    """
    if not COPYRIGHT.is_file():
        raise FileNotFoundError(
            f"The licence's text is not at {COPYRIGHT}. Install the font's package (on Debian and Ubuntu: apt install "
            f"{PACKAGE})."
        )
    paragraphs = COPYRIGHT.read_text(encoding="utf-8").split("\n\n")
    text = next(part for part in paragraphs if part.startswith("License:") and "SIL OPEN FONT LICENSE" in part)
    lines = ["" if line == " ." else line.removeprefix(" ") for line in text.splitlines()[1:]]
    return "Noto Color Emoji: Copyright 2013-2017 Google Inc.\n\n" + "\n".join(lines).strip() + "\n"


CREDIT = f"""This base learnt to draw from pictures that were made with the font Noto Color Emoji, version 2.042,
Copyright 2013-2017 Google Inc., https://github.com/googlefonts/noto-emoji, as Debian's package {PACKAGE} has it.

The font is licensed under the SIL Open Font License, Version 1.1, whose text is in {LICENCE}. No part of the font is
in this folder. The pictures were drawn, tilted, scaled and placed on coloured grounds by emoji_scenes.py, and the
weights trained on them by make_emoji.py, both of the project phased-consistency.
"""
