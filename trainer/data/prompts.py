"""The prompts that the teacher makes latents of: the list that ships, or a file."""

from __future__ import annotations

from pathlib import Path

from ..config.config import Config
from ..tiny.bundled import own_prompts
from .captions import lines_of
from .wildcards import expanded, has_wildcards

PROMPTS = Path(__file__).parent / "prompts.txt"


def read_prompts(file: str | None) -> list[str]:
    """The prompts of a file, one a line; blank lines and lines starting with # are left out.

    file: None for the list that ships with the pack. Raises ValueError for a missing or empty file, and for
    one that is no text.
    """
    path = Path(file) if file else PROMPTS
    if not path.is_file():
        raise ValueError(f"No prompt file at {path}. Set data.prompts to a text file with one prompt a line.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"  # told like UTF-16, which can be read as UTF-8 and has zeros
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8. Write a text file with one prompt a line.")
    prompts = [line for line in lines_of(text) if not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Write one a line.")
    return prompts


def prompts_of(config: Config) -> list[str]:
    """The prompts that a run's teacher makes latents of, `data.count` at most.

    They are those of `data.prompts`, else the base's own, else the list that ships; where these have wildcards, so many
    as there are latents, each with its own choice. Raises as `read_prompts` and `expanded`.
    """
    file, count = config.data.prompts or own_prompts(config.base.path), config.data.count
    return prompts_in(file, count)[:count]


def prompts_in(file: str | None, number: int) -> list[str]:
    """The prompts of a file, as `read_prompts`; where they have wildcards, `number` of them without (`expanded`)."""
    prompts = read_prompts(file)
    return expanded(prompts, number, Path(file or PROMPTS).parent) if has_wildcards(prompts) else prompts
