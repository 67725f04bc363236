"""The emoji base as a folder, with its licence and its prompts: an ordinary diffusers folder of SD3's type."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from diffusers import AutoencoderTiny
from torch import nn
from transformers import CLIPTokenizer

from .emoji_scenes import PACKAGE, random_scene
from .making import write_prompts, write_vocabulary
from .scenes import prompts
from .sd3_parts import new_pipeline

COPYRIGHT = Path("/usr/share/doc") / PACKAGE / "copyright"  # Debian's file, with the licence's text
LICENCE, ATTRIBUTION = "OFL-1.1.txt", "ATTRIBUTION.txt"
PROMPTS = 512  # to distil from


def save_emoji(vae: AutoencoderTiny, tokenizer: CLIPTokenizer, parts: nn.ModuleList, folder: Path) -> None:
    """Write the diffusers folder in fp16, with prompts to distil from, licence and attribution.

    Raises FileNotFoundError where Debian's package of the font, which has the licence's text, is not installed.
    """
    text = licence()
    halved = [deepcopy(part).half() for part in (vae, *parts)]
    new_pipeline(halved[0], tokenizer, *halved[1:]).save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        write_vocabulary(tokenizer, folder / name)
    write_prompts(prompts(PROMPTS, "emoji prompts 1", random_scene), folder)
    (folder / LICENCE).write_text(text, encoding="utf-8")
    (folder / ATTRIBUTION).write_text(CREDIT, encoding="utf-8")


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
weights trained on them by make_emoji.py, both of the project phased-consistency. Those in pictures/ were drawn in the
same way by demo_pictures.py.
"""
