"""`pcm sidecars`: files beside a LoRA that tell managers of it, with documented fields alone and no forged ids.

`name.json`: user metadata of A1111 and Forge (extensions-builtin/Lora/ui_edit_user_metadata.py).
`name.metadata.json`: ComfyUI Lora-Manager (docs/metadata-json-schema.md). `name.preview.png`: the picture
that both show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ...samplers.lora_file import file_hash, read_header
from ...samplers.lora_info import facts
from ..pictures import read_pictures, save_image, to_image
from ..system.files import write_text

A1111_VERSIONS = {"sd15": "SD1", "sd2": "SD2", "sdxl": "SDXL", "sd3": "SD3"}
BASE_MODELS = {"sd15": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL 1.0", "sd3": "SD 3"}
# the kinds of SD3.5, by ModelSpec's architecture in the header
SD35 = {"stable-diffusion-v3.5-medium": "SD 3.5 Medium", "stable-diffusion-v3.5-large": "SD 3.5 Large"}
UNKNOWN = "Unknown"


def sidecars(file: Path, preview: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the sidecars of a LoRA. preview: picture to show; default: the one that lies beside the file already.

    Returns what was written, and a sentence on it as "text".
    Raises ValueError for a file that holds no LoRA, a sidecar that exists, or a preview that is no picture;
    FileNotFoundError for one that is not there; OSError where they cannot be written.
    """
    header = read_header(file)
    file, about = header.path, facts(header)
    paths = [file.with_suffix(".json"), file.with_suffix(".metadata.json")]
    picture = file.with_suffix(".preview.png")
    # the picture beside the file may be the one that was named, and is not read and written at once
    in_place = preview is not None and picture.exists() and preview.samefile(picture)
    written = [*paths, *([picture] if preview and not in_place else [])]
    if not overwrite and (existing := [path.name for path in written if path.exists()]):
        raise ValueError(f"{', '.join(existing)} exists already beside {file.name}. Add --overwrite to replace it.")

    if preview is not None and not in_place:
        save_image(open_picture(preview), picture)
    for path, fields in zip(paths, (_a1111(about), _lora_manager(file, about, picture)), strict=True):
        write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    return {
        "file": str(file),
        "written": [str(path) for path in written],
        "preview": str(picture) if picture.exists() else None,
        "text": f"{len(written)} written: {', '.join(path.name for path in written)}",
    }


def _a1111(about: dict[str, Any]) -> dict[str, Any]:
    """The fields of name.json. about: `facts` of the file."""
    return {
        "description": about["metadata"].get("modelspec.description", ""),
        "sd version": A1111_VERSIONS.get(about["family"], UNKNOWN),
        "activation text": about["metadata"].get("modelspec.trigger_phrase", ""),
        "preferred weight": _strength(about),
        "negative text": "",
        "notes": _notes(about),
    }


def _lora_manager(file: Path, about: dict[str, Any], picture: Path) -> dict[str, Any]:
    """The fields of name.metadata.json. about: `facts` of the file. picture: its preview, which may not be there."""
    header = about["metadata"]
    architecture = header.get("modelspec.architecture", "").split("/")[0]
    status = file.stat()
    return {
        "file_name": file.stem,
        "model_name": header.get("modelspec.title") or file.stem,
        "file_path": file.resolve().as_posix(),
        "size": status.st_size,
        "modified": status.st_mtime,
        "sha256": file_hash(file),
        "base_model": SD35.get(architecture) or BASE_MODELS.get(about["family"], UNKNOWN),
        "preview_url": picture.resolve().as_posix() if picture.exists() else "",
        "usage_tips": json.dumps({"strength": _strength(about)}),
        "tags": [tag.strip() for tag in header.get("modelspec.tags", "").split(",") if tag.strip()],
        "notes": _notes(about),
        "modelDescription": header.get("modelspec.description", ""),
        "from_civitai": False,
    }


def _strength(about: dict[str, Any]) -> float:
    """The strength that the recipe recommends, else 1."""
    return about["recipe"]["strength"] if about["recipe"] else 1.0


def _notes(about: dict[str, Any]) -> str:
    """How to sample the LoRA: the recipe's sentence, else the header's own."""
    return about["usage"] or about["metadata"].get("modelspec.usage_hint", "")


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB, its transparency left out. Raises as `read_pictures`."""
    return to_image(read_pictures([path]).pixels[0, :3])
