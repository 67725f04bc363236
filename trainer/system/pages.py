"""HTML pages that need no other file: templates in which every value is escaped, and a missing one is an error."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from .files import write_text


def write_page(out: Path, template: Path, content: dict[str, Any], **filters: Callable[[Any], str]) -> None:
    """Write a page from a template and its content, whole or not at all.

    filters: functions that the template may call by these names. Raises OSError where the page cannot be
    written.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    page = environment.get_template(template.name).render(**content)
    # JSON may hold halves of characters, which UTF-8 does not have
    write_text(out, page.encode(errors="replace").decode())


def data_url(data: bytes, kind: str) -> str:
    """A picture file's bytes as an address that holds them. kind: png, jpeg, ..."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def jpeg_url(image: Image.Image, quality: int) -> str:
    """A picture as an address that holds it as a JPEG without subsampled colours."""
    image.convert("RGB").save(file := io.BytesIO(), "JPEG", quality=quality, subsampling=0)
    return data_url(file.getvalue(), "jpeg")
