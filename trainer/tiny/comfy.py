"""The bundled emoji base, its 4-step LoRA and pictures to edit as files for ComfyUI.

    python -m phased_consistency.trainer.tiny.comfy FOLDER [--overwrite]

FOLDER is a ComfyUI, or any folder that it is given as --base-directory. ComfyUI's own Python will do for it,
after `python -m pip install -e .` in this pack's folder. The checkpoint holds the transformer and the
tiny VAE; the node *PCM Demo Prompt* takes the place of text encoders, which ComfyUI builds full size only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save

from ...samplers.writing import written_whole
from .single_file import sd3_checkpoint, sd3_tiny_vae, sd3_transformer
from .taesd import full_size

BASE = Path(__file__).parent / "emoji"
LORA = BASE / "pcm_demo_emoji_4step.safetensors"
PICTURES = BASE / "pictures"  # drawn by `demo_pictures`
CHECKPOINT = "pcm_demo_emoji.safetensors"
TITLE = {"modelspec.title": "Demo base of phased-consistency: 128 x 128, prompts by the node PCM Demo Prompt"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def main(argv: list[str] | None = None) -> int:
    """Write the files and say what to do next. Returns 0, or after a sentence on an error 1 or 2, as `pcm` does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a ComfyUI, or its --base-directory")
    parser.add_argument("--overwrite", action="store_true", help="replace other files of these names")
    args = parser.parse_args(argv)
    try:
        for path in write_files(args.folder, args.overwrite):
            print(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Cannot write the files: {error}. Free space or choose another folder.", file=sys.stderr)
        return 1
    print(
        "Start ComfyUI with this pack in custom_nodes, and open Templates > phased-consistency > 00_demo, or an edit "
        "below it. A ComfyUI that runs already sees the files after R, or Edit > Refresh Node Definitions."
    )
    return 0


def write_files(folder: Path, overwrite: bool = False) -> list[Path]:
    """Write checkpoint and LoRA into models/ of this folder, and pictures to edit into input/. Returns their paths.

    A file that is there already, byte for byte, is left alone. Raises ValueError, before anything is written,
    for another file of that name unless it may be overwritten; OSError when a file cannot be written, and
    then it is not there.
    """
    models = folder / "models"
    files = {models / "checkpoints" / CHECKPOINT: checkpoint(), models / "loras" / LORA.name: LORA.read_bytes()}
    files |= {folder / "input" / path.name: path.read_bytes() for path in sorted(PICTURES.glob("*.png"))}
    new = {path: content for path, content in files.items() if not (path.is_file() and path.read_bytes() == content)}
    for path in new:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} is another file. Move it away, or replace it with --overwrite.")
    for path, content in new.items():
        with written_whole(path) as part:
            part.write_bytes(content)
    return list(files)


def checkpoint(base: Path = BASE) -> bytes:
    """The bytes of a bundled base's folder as one .safetensors file, its weights in fp16 as they are bundled."""
    config = json.loads((base / "vae" / "config.json").read_text(encoding="utf-8"))
    vae = full_size(load_file(base / "vae" / WEIGHTS), config["num_encoder_blocks"], config["num_decoder_blocks"])
    vae_as_taesd = sd3_tiny_vae(vae, config["scaling_factor"], config["shift_factor"])
    return save(sd3_checkpoint(sd3_transformer(load_file(base / "transformer" / WEIGHTS)), vae_as_taesd), TITLE)


if __name__ == "__main__":
    sys.exit(main())
