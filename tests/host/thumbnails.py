"""The pictures of the templates that the demo base can draw: each is made by a demo's template, in a real ComfyUI.

    python -m host.thumbnails [NAME ...]

in tests/ writes them anew. A template for other files has what the demo's of the same edit draws.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageOps, ImageSequence

from host.server import Server, hosts
from host.templates import FOLDER
from host.workflows import ROOT, to_api
from phased_consistency.trainer.tiny.comfy import write_files
from phased_consistency.trainer.tiny.scenes import Scene, Shape, draw

SIDE, GAP, INK, QUALITY = 256, 8, (38, 39, 41), 80  # of a picture, between two, the colour there, JPEG's
SHOWN = 4  # pictures at most, of those that a template draws

NIGHT, SNOW = "blue", "white"
SCENES = {  # of the templates whose models nobody here has: what is drawn in their place
    "16_flux_turbo": (
        Scene((Shape("orange", "triangle", 0.5, 0.55, 0.3), Shape("white", "circle", 0.5, 0.68, 0.1)), SNOW, "", ""),
    ),
    "17_qwen_image_lightning": (
        Scene((Shape("yellow", "square", 0.5, 0.45, 0.32), Shape("red", "heart", 0.5, 0.45, 0.16)), "green", "", ""),
    ),
    "18_z_image_turbo": (
        Scene((Shape("white", "triangle", 0.5, 0.6, 0.3), Shape("yellow", "star", 0.5, 0.24, 0.14)), NIGHT, "", ""),
    ),
    "19_wan22_two_experts": tuple(
        Scene((Shape("orange", "star", x, y, 0.18), Shape("yellow", "moon", 0.8, 0.2, 0.12)), NIGHT, "", "")
        for x, y in ((0.2, 0.75), (0.4, 0.55), (0.6, 0.75), (0.8, 0.6))
    ),
}
PROMPTS = {  # what *00_demo* draws for a template, one picture of each
    "01_text_to_image_sd15": (
        "a large penguin on a blue background",
        "a large strawberry on a white background",
        "a large watermelon on a yellow background",
        "a large pine tree on a pink background",
    ),
    "03_text_to_image_sd3": (
        "a panda left of a strawberry on a blue background",
        "a pumpkin left of a pine tree on a white background",
        "a watermelon left of a penguin on a green background",
        "a moon left of a rocket on a black background",
    ),
}
SAME = {  # the demo's template of the same edit
    "04_compare_steps": "00_demo_1_compare",
    "05_image_to_image": "00_demo_2_image_to_image",
    "07_inpaint": "00_demo_3_inpaint",
    "08_outpaint": "00_demo_4_outpaint",
    "09_colorize": "00_demo_5_colorize",
    "10_super_resolution": "00_demo_6_super_resolution",
    "11_stroke_to_image": "00_demo_7_stroke_to_image",
    "12_denoise": "00_demo_8_denoise",
    "13_interpolate": "00_demo_9_interpolate",
}
TEMPLATES = ("00_demo", *PROMPTS, *SAME.values())


def graphs(server: Server, name: str) -> Iterator[dict[str, Any]]:
    """The demo's graph for this template, once for each prompt."""
    template = FOLDER / f"{'00_demo' if name in PROMPTS else name}.json"
    kinds, saved = server.get("/object_info"), json.loads(template.read_text(encoding="utf-8"))
    for prompt in PROMPTS.get(name, (None,)):
        graph = to_api(saved, kinds)
        if prompt:
            next(node for node in graph.values() if node["class_type"] == "PCMDemoPrompt")["inputs"]["text"] = prompt
            next(node for node in graph.values() if "batch_size" in node["inputs"])["inputs"]["batch_size"] = 1
        yield graph


def drawn(server: Server, name: str) -> Image.Image:
    """A thumbnail: what the template begins with, and what it draws. Raises RuntimeError with the host's words where it
    does not run."""
    before, after = [], []
    for graph in graphs(server, name):
        run = server.run(graph)
        if run.error:
            raise RuntimeError(f"{name}: {run.error['exception_message']}")
        loaded = [node["inputs"]["image"] for node in graph.values() if node["class_type"] == "LoadImage"]
        before += [server.base / "input" / file for file in loaded]
        node = next(i for i, entry in graph.items() if entry["class_type"].startswith("Save"))
        after += [server.base / "output" / image["filename"] for image in run.outputs[node]["images"]]
    frames = [frame.convert("RGBA") for path in after for frame in ImageSequence.Iterator(Image.open(path))]
    chosen = (
        [frames[round(i * (len(frames) - 1) / (SHOWN - 1))] for i in range(SHOWN)] if len(frames) > SHOWN else frames
    )
    pictures = [*(Image.open(path).convert("RGBA") for path in before), *chosen]
    return pairs(pictures) if len(pictures) > 1 else pictures[0].convert("RGB")


def pairs(pictures: list[Image.Image]) -> Image.Image:
    """Pictures two by two, each within a square of `SIDE`, as the template browser's cards are."""
    rows = (len(pictures) + 1) // 2
    sheet = Image.new("RGB", (2 * SIDE + GAP, rows * (SIDE + GAP) - GAP), INK)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, 2)
        how = Image.Resampling.NEAREST if max(picture.size) < SIDE else Image.Resampling.LANCZOS
        fitted = ImageOps.pad(picture.convert("RGBA"), (SIDE, SIDE), how, (*INK, 0))
        place = column * (SIDE + GAP), row * (SIDE + GAP)
        sheet.paste(fitted, place, fitted)
    return sheet


def main(names: list[str]) -> None:
    """Write the thumbnails of these templates, or all."""
    for name in set(SCENES) & set(names or SCENES):
        scenes = [draw(scene, 2 * SIDE) for scene in SCENES[name]]
        keep(pairs(scenes) if len(scenes) > 1 else scenes[0], name)
    names = [SAME.get(name, name) for name in names or TEMPLATES if SAME.get(name, name) in TEMPLATES]
    if not names:
        return
    with TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "phased-consistency").symlink_to(ROOT, target_is_directory=True)
        write_files(base)
        with Server(hosts()[0], base) as server:
            for name in names:
                picture = drawn(server, name)
                for each in (name, *(other for other, same in SAME.items() if same == name)):
                    keep(picture, each)


def keep(picture: Image.Image, name: str) -> None:
    picture.save(FOLDER / f"{name}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main(sys.argv[1:])
