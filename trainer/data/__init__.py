"""What the student learns on: captioned pictures, or prompts alone; both end as cached latents."""

from __future__ import annotations

from pathlib import Path

from .digits import NAME as DIGITS
from .digits import Digit, drawn_digits
from .folders import Picture, find_pictures

PROMPTS = Path(__file__).parent / "prompts.txt"


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
