"""The pictures of the templates, drawn by the demo base in a real ComfyUI, by a demo's template or the demo's files.

    python -m host.thumbnails [NAME ...]

in tests/ writes them anew. A template for other files has what the demo's of the same edit draws. What the demo base
cannot draw, a larger picture, a clip and what a ControlNet does, is put together of the emoji that it learnt from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageSequence

from host.server import Server, demo_host
from host.templates import FOLDER
from host.workflows import to_api
from phased_consistency.trainer.tiny.comfy import CHECKPOINT, LORA
from phased_consistency.trainer.tiny.emoji_scenes import EmojiScene, Spot, draw

SIDE, GAP, INK, QUALITY = 256, 8, (38, 39, 41), 80  # of a picture, between two, the colour there, JPEG's
SHOWN = 4  # pictures at most, of those that a template draws


@dataclass(frozen=True)
class Example:
    """One run of a template. prompt: in place of the template's, for one picture instead of a batch; "": as it is.
    changes: inputs by the kind of their node."""

    template: str
    prompt: str = ""
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


def texts(*prompts: str) -> tuple[Example, ...]:
    """A picture of each, by *00_demo*."""
    return tuple(Example("00_demo", prompt) for prompt in prompts)


def guided(*cfgs: float) -> tuple[Example, ...]:
    """The same picture with CFG schedules of these CFG."""
    prompt = "a large burger on a yellow background"
    changes = ({"PCMCFGSchedule": {"cfg": cfg, "to_step": 2}} for cfg in cfgs)
    return tuple(Example("15_cfg_schedule", prompt, change) for change in changes)


STEPS = {"PCMCompare": {"step_counts": "1, 2, 4", "modes": "deterministic, stochastic, gamma 0.3"}}
EXAMPLES = {
    "00_demo": (Example("00_demo"),),
    "01_text_to_image_sd15": texts(
        "a large panda on a yellow background",
        "a large strawberry on a white background",
        "a large mushroom on a blue background",
        "a large soccer ball on a green background",
    ),
    "02_text_to_image_sdxl": texts(
        "a large avocado on a white background",
        "a large cool face on a blue background",
        "a large pumpkin on a yellow background",
        "a large rainbow on a green background",
    ),
    "03_text_to_image_sd3": texts(
        "a panda left of a strawberry on a blue background",
        "an apple left of a mushroom on a white background",
        "a watermelon left of an avocado on a green background",
        "a heart left of a pumpkin on a yellow background",
    ),
    "04_compare_steps": (Example("00_demo_1_compare", "a large strawberry on a white background", STEPS),),
    "05_image_to_image": (Example("00_demo_2_image_to_image"),),
    "07_inpaint": (Example("00_demo_3_inpaint"),),
    "08_outpaint": (Example("00_demo_4_outpaint"),),
    "09_colorize": (Example("00_demo_5_colorize"),),
    "10_super_resolution": (Example("00_demo_6_super_resolution"),),
    "11_stroke_to_image": (Example("00_demo_7_stroke_to_image"),),
    "12_denoise": (Example("00_demo_8_denoise"),),
    "13_interpolate": (Example("00_demo_9_interpolate"),),
    "15_cfg_schedule": guided(1.0, 2.0),
    "16_flux_turbo": texts(
        "a large apple on a white background",
        "a large fries on a blue background",
        "a large heart on a green background",
        "a large lemon on a yellow background",
    ),
    "17_qwen_image_lightning": texts(
        "a large grapes on a white background",
        "a large pizza on a green background",
        "a large ice cream on a blue background",
        "a large cookie on a yellow background",
    ),
    "18_z_image_turbo": texts(
        "a large fire on a blue background",
        "a large basketball on a white background",
        "a large pear on a green background",
        "a large happy face on a purple background",
    ),
}
# by the template that is drawn as it is, but for the prompt; both have the one picture
SAME = {example.template: name for name, (example, *_) in EXAMPLES.items() if example.template.startswith("00_demo_")}


def scene(*spots: Spot, ground: str = "blue", side: int = SIDE) -> Image.Image:
    return draw(EmojiScene(spots, ground, "", ""), side)


def enlarged() -> Iterator[Image.Image]:
    """A small picture, and the same large."""
    for side in (SIDE // 6, SIDE):
        yield scene(Spot("tiger", 0.5, 0.5, 0.85, 0), ground="green", side=side)


def outlined() -> Iterator[Image.Image]:
    """A picture, its mask, its outlines, and the same outlines with another look."""
    picture = scene(Spot("mushroom", 0.5, 0.5, 0.8, 0))
    mask = ImageChops.difference(picture, Image.new("RGB", picture.size, picture.getpixel((0, 0)))).convert("L")
    mask = mask.point(lambda level: 255 * (level > 8))
    yield picture
    yield Image.composite(Image.new("RGB", picture.size, INK), picture, mask.filter(ImageFilter.MaxFilter(9)))
    outlines = picture.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda level: 255 * (level > 40))
    yield ImageChops.multiply(outlines, mask.filter(ImageFilter.MaxFilter(9))).convert("RGB")
    red, green, blue = picture.split()
    yield Image.composite(Image.merge("RGB", (blue, green, red)), picture, mask)


def walk() -> Iterator[Image.Image]:
    """Frames of a clip: a fox walks, under a sun that stays."""
    sun = Spot("sun", 0.8, 0.2, 0.3, 0)
    for i in range(SHOWN):
        yield scene(sun, Spot("fox", 0.22 + 0.18 * i, 0.68 - 0.06 * (i % 2), 0.4, 0), ground="white")


PUT_TOGETHER: dict[str, Callable[[], Iterator[Image.Image]]] = {
    "06_hires_pass": enlarged,
    "14_inpaint_with_controlnet": outlined,
    "19_wan22_two_experts": walk,
}


def graph_of(example: Example, kinds: dict[str, Any]) -> dict[str, Any]:
    """The graph of an example, in the form that the server takes."""
    saved = (FOLDER / f"{example.template}.json").read_text(encoding="utf-8")
    graph = to_api(json.loads(saved), kinds)
    with_demo_files(graph)
    if example.prompt:
        next(node for node in graph.values() if node["class_type"] == "PCMDemoPrompt")["inputs"]["text"] = (
            example.prompt
        )
        next(node for node in graph.values() if "batch_size" in node["inputs"])["inputs"]["batch_size"] = 1
    for node in graph.values():
        node["inputs"] |= example.changes.get(node["class_type"], {})
    return graph


def with_demo_files(graph: dict[str, Any]) -> None:
    """Give a graph for SD1.5 the demo's files, size, and prompts, which are empty."""
    if any(node["class_type"] == "PCMDemoPrompt" for node in graph.values()):
        return
    for node in graph.values():
        if node["class_type"] == "CLIPTextEncode":
            node |= {"class_type": "PCMDemoPrompt", "inputs": {"text": ""}}
        elif node["class_type"] == "EmptyLatentImage":
            node |= {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
        names = {"ckpt_name": CHECKPOINT, "lora": LORA.name}
        node["inputs"] |= {key: name for key, name in names.items() if key in node["inputs"]}


def pictures_of(server: Server, example: Example) -> tuple[list[Image.Image], list[Image.Image]]:
    """What a template begins with, and what it draws. Raises RuntimeError with the host's words where it does not
    run."""
    graph = graph_of(example, server.get("/object_info"))
    run = server.run(graph)
    if run.error:
        raise RuntimeError(f"{example.template}: {run.error['exception_message']}")
    before = [
        Image.open(server.base / "input" / node["inputs"]["image"])
        for node in graph.values()
        if node["class_type"] == "LoadImage"
    ]
    files = [
        server.base / image["type"] / image["filename"]
        for i, node in graph.items()
        if node["class_type"].startswith("Save")
        for image in run.outputs[i]["images"]
    ]
    return before, [frame.convert("RGBA") for path in files for frame in ImageSequence.Iterator(Image.open(path))]


def drawn(server: Server, examples: tuple[Example, ...]) -> Image.Image:
    """A thumbnail: what the templates begin with, and what they draw."""
    before, after = [], []
    for example in examples:
        begun, ended = pictures_of(server, example)
        before += begun
        after += ended
    if len(after) > SHOWN:
        after = [after[round(i * (len(after) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    return sheet([*before, *after])


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures two by two, each within a square of `SIDE`, as the template browser's cards are; one alone takes as much
    room as four, at most."""
    if len(pictures) == 1:
        pictures[0].thumbnail((2 * SIDE, 2 * SIDE))
        return pictures[0].convert("RGB")
    rows = (len(pictures) + 1) // 2
    page = Image.new("RGB", (2 * SIDE + GAP, rows * (SIDE + GAP) - GAP), INK)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, 2)
        how = Image.Resampling.NEAREST if max(picture.size) < SIDE else Image.Resampling.LANCZOS
        fitted = ImageOps.pad(picture.convert("RGBA"), (SIDE, SIDE), how, (*INK, 0))
        place = column * (SIDE + GAP), row * (SIDE + GAP)
        page.paste(fitted, place, fitted)
    return page


def main(names: list[str]) -> None:
    """Write the thumbnails of these templates, or all."""
    names = [SAME.get(name, name) for name in names or (*PUT_TOGETHER, *EXAMPLES)]
    for name in PUT_TOGETHER.keys() & set(names):
        keep(sheet(list(PUT_TOGETHER[name]())), name)
    if not EXAMPLES.keys() & set(names):
        return
    with demo_host() as server:
        for name in (name for name in names if name in EXAMPLES):
            picture = drawn(server, EXAMPLES[name])
            for each in (name, *(other for other, same in SAME.items() if same == name)):
                keep(picture, each)


def keep(picture: Image.Image, name: str) -> None:
    picture.save(FOLDER / f"{name}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main(sys.argv[1:])
