"""Files beside a LoRA that tell managers of it, as `pcm sidecars` writes them: documented fields alone, no forged ids.

`name.json`: user metadata of A1111 and Forge (extensions-builtin/Lora/ui_edit_user_metadata.py). `name.metadata.json`:
ComfyUI Lora-Manager (docs/metadata-json-schema.md). `name.preview.png`: the picture that both show.
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
# where the header tells it from SD3
SD35 = {"stable-diffusion-v3.5-medium": "SD 3.5 Medium", "stable-diffusion-v3.5-large": "SD 3.5 Large"}
UNKNOWN = "Unknown"


def sidecars(file: Path, preview: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the sidecars of a LoRA; the preview is one of `preview`, or the one that lies there already.

    Raises ValueError for a file that holds no LoRA, a sidecar that exists, or a preview that is no picture;
    FileNotFoundError for one that is not there; OSError where they cannot be written.
    """
    told = facts(read_header(file))
    paths = [file.with_suffix(".json"), file.with_suffix(".metadata.json")]
    picture = file.with_suffix(".preview.png")
    own = preview is not None and picture.exists() and preview.samefile(picture)
    written = [*paths, *([picture] if preview and not own else [])]
    if not overwrite and (there := [path.name for path in written if path.exists()]):
        raise ValueError(f"{', '.join(there)} exists already beside {file.name}. Add --overwrite to replace it.")
    if preview is not None and not own:
        save_image(open_picture(preview), picture)
    for path, fields in zip(paths, (_a1111(told), _lora_manager(file, told, picture)), strict=True):
        write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    return {
        "file": str(file),
        "written": [str(path) for path in written],
        "preview": str(picture) if picture.exists() else None,
        "text": f"{len(written)} written: {', '.join(path.name for path in written)}",
    }


def _a1111(told: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": told["metadata"].get("modelspec.description", ""),
        "sd version": A1111_VERSIONS.get(told["family"], UNKNOWN),
        "activation text": told["metadata"].get("modelspec.trigger_phrase", ""),
        "preferred weight": _strength(told),
        "negative text": "",
        "notes": _notes(told),
    }


def _lora_manager(file: Path, told: dict[str, Any], picture: Path) -> dict[str, Any]:
    header, architecture = told["metadata"], told["metadata"].get("modelspec.architecture", "").split("/")[0]
    status = file.stat()
    return {
        "file_name": file.stem,
        "model_name": header.get("modelspec.title") or file.stem,
        "file_path": file.resolve().as_posix(),
        "size": status.st_size,
        "modified": status.st_mtime,
        "sha256": file_hash(file),
        "base_model": SD35.get(architecture) or BASE_MODELS.get(told["family"], UNKNOWN),
        "preview_url": picture.resolve().as_posix() if picture.exists() else "",
        "usage_tips": json.dumps({"strength": _strength(told)}),
        "tags": [tag.strip() for tag in header.get("modelspec.tags", "").split(",") if tag.strip()],
        "notes": _notes(told),
        "modelDescription": header.get("modelspec.description", ""),
        "from_civitai": False,
    }


def _strength(told: dict[str, Any]) -> float:
    return told["recipe"]["strength"] if told["recipe"] else 1.0


def _notes(told: dict[str, Any]) -> str:
    """How to sample it: the recipe's sentence, else the header's own."""
    return told["usage"] or told["metadata"].get("modelspec.usage_hint", "")


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB, its transparency left out. Raises as `read_pictures`."""
    return to_image(read_pictures([path]).pixels[0, :3])
