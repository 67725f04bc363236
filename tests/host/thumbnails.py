"""The pictures of those templates that the demo base can draw: each is made by its own template, in a real ComfyUI.

    python -m host.thumbnails [NAME ...]

in tests/ writes them anew. The demo's checkpoint, LoRA, prompts and size take the place of the template's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageSequence

from host.server import Server, hosts
from host.templates import FOLDER
from host.workflows import ROOT, to_api
from phased_consistency.trainer.tiny.comfy import CHECKPOINT, LORA, write_files
from phased_consistency.trainer.tiny.scenes import Scene, Shape, draw

SIDE, GAP, INK, QUALITY = 256, 8, (38, 39, 41), 80  # of a picture, between two, the colour there, JPEG's
INPUT = "example.png"  # what Load Image has: the scene
CIRCLE, SQUARE = Shape("yellow", "circle", 0.5, 0.27, 0.19), Shape("white", "square", 0.5, 0.73, 0.19)
SCENE = Scene((CIRCLE, SQUARE), background="purple", pattern="", caption="")
DEMO = {  # inputs by kind of node
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
    "PCMLoadLora": {"lora": LORA.name},
    "EmptyLatentImage": {"width": 128, "height": 128},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "ImageScale": {"width": 128},
}


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


@dataclass(frozen=True)
class Thumbnail:
    """What a template is to draw; it is queued once for each prompt.

    own: inputs by kind of node that differ from the template's. before: show what Load Image has, too. last: the last
    prompt, where the template goes from one to another.
    """

    prompts: tuple[str, ...]
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    before: bool = False
    last: str = ""


THUMBNAILS = {
    "00_demo": Thumbnail(("a yellow moon above a white cross on a purple background",)),
    "03_text_to_image_sd3": Thumbnail(
        (
            "a pink square left of a blue circle on a yellow background",
            "a white moon above a red circle on a blue background",
            "a yellow square above a green triangle on a black background",
            "a blue cross above a pink circle on a white background",
        )
    ),
    "04_compare_steps": Thumbnail(
        ("a red circle above a yellow star on a blue background",), {"EmptyLatentImage": {"batch_size": 3}}
    ),
    "05_image_to_image": Thumbnail(("a yellow moon above a white square on a purple background",), before=True),
    "13_interpolate": Thumbnail(
        ("a yellow moon above a white cross on a purple background",),
        {"PCMInterpolate": {"frames": 4}},
        last="a yellow circle above a white square on a purple background",
    ),
}


def graphs(server: Server, name: str) -> Iterator[dict[str, Any]]:
    """A template's graph with each prompt of its thumbnail, and with the demo's files and size."""
    thumbnail = THUMBNAILS[name]
    template = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for prompt in thumbnail.prompts:
        graph, texts = to_api(template, server.get("/object_info")), iter((prompt, thumbnail.last, ""))
        for node in graph.values():
            kind = node["class_type"]
            if kind in ("CLIPTextEncode", "PCMDemoPrompt"):
                node |= {"class_type": "PCMDemoPrompt", "inputs": {"text": next(texts)}}
            node["inputs"] |= DEMO.get(kind, {}) | thumbnail.own.get(kind, {})
        yield graph


def drawn(server: Server, name: str) -> Image.Image:
    """A template's thumbnail. Raises RuntimeError with the host's words where it does not run."""
    paths = [server.base / "input" / INPUT] if THUMBNAILS[name].before else []
    for graph in graphs(server, name):
        run = server.run(graph)
        if run.error:
            raise RuntimeError(f"{name}: {run.error['exception_message']}")
        node = next(i for i, entry in graph.items() if entry["class_type"].startswith("Save"))
        paths += [server.base / "output" / image["filename"] for image in run.outputs[node]["images"]]
    frames = [frame.convert("RGB") for path in paths for frame in ImageSequence.Iterator(Image.open(path))]
    return pairs(frames) if len(frames) > 1 else frames[0]


def pairs(pictures: list[Image.Image]) -> Image.Image:
    """Pictures two by two, each of `SIDE`: the template browser's cards are square."""
    rows = (len(pictures) + 1) // 2
    sheet = Image.new("RGB", (2 * SIDE + GAP, rows * (SIDE + GAP) - GAP), INK)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, 2)
        place = column * (SIDE + GAP), row * (SIDE + GAP)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), place)
    return sheet


def main(names: list[str]) -> None:
    """Write the thumbnails of these templates, or all."""
    for name in set(SCENES) & set(names or SCENES):
        scenes = [draw(scene, 2 * SIDE) for scene in SCENES[name]]
        sheet = pairs(scenes) if len(scenes) > 1 else scenes[0]
        sheet.save(FOLDER / f"{name}.jpg", quality=QUALITY)
    names = [name for name in names or THUMBNAILS if name in THUMBNAILS]
    if not names:
        return
    with TemporaryDirectory() as folder:
        base = Path(folder)
        for name in ("custom_nodes", "input"):
            (base / name).mkdir()
        (base / "custom_nodes" / "phased-consistency").symlink_to(ROOT, target_is_directory=True)
        draw(SCENE, 128).save(base / "input" / INPUT)
        write_files(base)
        with Server(hosts()[0], base) as server:
            for name in names:
                drawn(server, name).save(FOLDER / f"{name}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main(sys.argv[1:])
