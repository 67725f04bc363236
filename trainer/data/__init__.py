"""What the student learns on: a folder of captioned pictures, or prompts alone; both end as cached latents."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .digits import NAME as DIGITS
from .digits import Digit, drawn_digits

PROMPTS = Path(__file__).parent / "prompts.txt"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Picture:
    """A picture file and its caption."""

    path: Path
    caption: str

    @property
    def name(self) -> str:
        return self.path.name

    def content(self) -> str:
        """What decides the picture."""
        return content_hash(self.path)

    def load(self, resolution: int) -> tuple[Tensor, Tensor]:
        """See `load_picture`."""
        return load_picture(self.path, resolution)


def read_prompts(file: str | None) -> list[str]:
    """Prompts, one a line; blank lines and lines starting with # are left out. None: the list that ships with the pack.

    Raises ValueError for a missing or empty file, and for one that is no text.
    """
    path = Path(file) if file else PROMPTS
    if not path.is_file():
        raise ValueError(f"No prompt file at {path}. Set data.prompts to a text file with one prompt a line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8. Write a text file with one prompt a line.")
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Write one a line.")
    return prompts


def pictures_of(images: str, count: int, skip_bad: bool) -> tuple[list[Picture] | list[Digit], list[str]]:
    """What `data.images` names: `count` drawn digits, or a folder's pictures and the skipped ones (`find_pictures`).

    Raises ValueError where the word for the drawn ones is a folder's name, too.
    """
    if images == DIGITS and Path(images).is_dir():
        raise ValueError(
            f"data.images={images} means drawn digits, and a folder is called so: for that write ./{images}."
        )
    return (drawn_digits(count), []) if images == DIGITS else find_pictures(images, skip_bad)


def find_pictures(folder: str, skip_bad: bool) -> tuple[list[Picture], list[str]]:
    """Pictures below a folder with their captions (same name, .txt), and the skipped ones with the reason.

    Raises ValueError for a missing or empty folder, and for missing or empty captions unless `skip_bad`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"No folder at {folder}. Set data.images to a folder of pictures with .txt captions.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)}).")
    pictures, bad = [], []
    for file in files:
        text = file.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8-sig").strip()
            problem = "empty caption"
        except OSError:
            caption, problem = "", "no caption"
        except UnicodeDecodeError:
            caption, problem = "", "not UTF-8:"
        if caption:
            pictures.append(Picture(file, caption))
        else:
            bad.append(f"{file.relative_to(root)}: {problem} {text.name}")
    stop_or_skip(bad, skip_bad, f"of the {len(files)} pictures in {folder} have no caption")
    if not pictures:
        raise ValueError(f"None of the {len(files)} pictures in {folder} has a caption (same name, .txt).")
    return pictures, bad


def stop_or_skip(bad: list[str], skip_bad: bool, what: str) -> None:
    """Raise ValueError that names the bad items, unless they may be skipped."""
    if bad and not skip_bad:
        more = [f"and {len(bad) - 10} more"] if len(bad) > 10 else []
        shown = "".join(f"  {line}\n" for line in bad[:10] + more)
        raise ValueError(
            f"{len(bad)} {what}:\n{shown}Mend or remove them, or set data.skip_bad=true to leave them out."
        )


def load_picture(path: Path, resolution: int) -> tuple[Tensor, Tensor]:
    """A picture as (3, R, R) in [-1, 1]: upright, short side resized (Lanczos), centre cropped, on white; its sizes.

    sizes: (6,) original height and width, top and left of the crop (in the resized picture), height and width of the
    result: SDXL's micro-conditioning (arXiv 2307.01952, Sec. 2.2). Raises ValueError when it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "P"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise ValueError(f"cannot be read ({error})") from error
    width, height = image.size
    scale = resolution / min(image.size)
    image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = ((side - resolution) // 2 for side in image.size)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(127.5).sub(1)
    return pixels, torch.tensor([height, width, top, left, resolution, resolution])


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
