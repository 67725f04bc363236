"""The templates of the demo base: text to image, and edits of the pictures that `make comfy` puts into input/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from host.templates.edits import between, picture_to_picture
from host.templates.parts import AS_RECOMMENDED, DEMO, load_image, scaled
from host.templates.pictures import compare, from_picture, text_to_image
from host.workflows import Workflow
from phased_consistency.samplers.emoji_words import GROUNDS, THINGS


def demo() -> Workflow:
    note = f"""\
# Try it, without a checkpoint

A tiny base that draws emoji, and a 4-step LoRA for it: a picture takes seconds on a CPU.

**Files**: *make comfy* puts them where they belong and starts ComfyUI. Into a ComfyUI that you have, in this \
pack's folder and with its Python: *python -m pip install -e .*, then *python -m \
phased_consistency.trainer.tiny.comfy FOLDER*, with its folder.

**Prompt**: the base has no text encoders. *PCM Demo Prompt* takes their place. It knows one thing, \
which may be large, or two, of which one is left or right of the other, on a background:
- {", ".join(THINGS)};
- on {", ".join(GROUNDS)}, or on striped, dotted or checkered blue, and so on.

**Settings**: none to find: {AS_RECOMMENDED}; *Load PCM LoRA* and *Sample PCM* write what they do on themselves. \
Pictures are of 128 x 128, four at once, shown four times as large.

**Edits**: *00_demo_1_compare* to *00_demo_9_interpolate* need nothing else either."""
    return text_to_image("00_demo", DEMO, "a large strawberry on a white background", note, 4, width=460)


@dataclass(frozen=True)
class Demo:
    """A template of one edit. edit: its name, as the template's and the picture's have it. title, about, further: of
    the note: its heading, what the edit does here, what to try. builder: what makes the workflow of it."""

    edit: str
    title: str
    about: str
    further: str
    builder: Callable[..., Workflow]

    def workflow(self, number: int) -> Workflow:
        note = f"""\
# {self.title}, with the demo base

{self.about}

**Try**: {self.further}

**Files**: *make comfy* has put base, LoRA and picture where they belong; *00_demo* says how else they get there, and \
lists the words that a prompt may have.

**Size**: pictures of 128 x 128, shown four times as large."""
        return self.builder(name=f"00_demo_{number}_{self.edit}", kind=DEMO, note=note)


def edited(edit: str, node: str, prompt: str, seed: int = 42, **own: Any) -> Callable[..., Workflow]:
    """The builder for an editing node on its own picture. seed: one that draws well."""
    picture = (load_image(f"pcm_demo_{edit}.png"),)
    return partial(picture_to_picture, node=node, prompt=prompt, picture=picture, seed=seed, **own)


LION = load_image("pcm_demo_image_to_image.png")

DEMOS = (
    Demo(
        "compare",
        "Compare step counts",
        "The same seed and prompt at 1, 2, 4 and 8 steps, as many passes of the network; and the base without "
        "the LoRA at 40 steps, which are 80 passes.",
        "other *step_counts*, or *modes* such as *deterministic, stochastic*. To see what the base draws in 4 steps "
        "without the LoRA, set *steps* there.",
        partial(
            compare,
            prompt="a large strawberry on a white background",
            steps=40,
            cfg=4.0,
            sampler_name="euler",
            scheduler="simple",
        ),
    ),
    Demo(
        "image_to_image",
        "Image to image",
        "A lion becomes a tiger: half of the LoRA's steps, from the picture.",
        "*denoise* 0.75 goes further from the picture, 0.25 stays near it; another animal; a picture of your own, of "
        "any size.",
        partial(
            from_picture,
            prompt="a large tiger on a blue background",
            picture=(LION, scaled(LION, 128, 128, "center")),
            seed=1,
        ),
    ),
    Demo(
        "inpaint",
        "Inpaint",
        "What the mask covers, a moon, becomes a watermelon. All else stays, pixel for pixel.",
        "another thing in the prompt. Right click on *Load Image*, Open in MaskEditor, to paint the mask anew.",
        edited("inpaint", "PCMInpaint", "a fox left of a watermelon on a blue background", 1, mask=True),
    ),
    Demo(
        "outpaint",
        "Outpaint",
        "Half a picture gets its other half: 64 pixels on the right, with a pumpkin. What is there stays.",
        "another thing in the prompt; or *left* 64 and *right* 0, and the prompt from the other side.",
        edited("outpaint", "PCMOutpaint", "a fox left of a pumpkin on a blue background", 2, right=64),
    ),
    Demo(
        "colorize",
        "Colorize",
        "A grey picture gets its colours. Every pixel keeps its lightness.",
        "another ground in the prompt, such as yellow; or a picture of your own, of 128 x 128.",
        edited("colorize", "PCMColorize", "a large strawberry on a white background"),
    ),
    Demo(
        "super_resolution",
        "Super-resolution",
        "A picture of 32 x 32 becomes one of 128 x 128. Scaled down again, it is the picture it came from.",
        "*denoise* 1, which invents more, or 0.5.",
        edited("super_resolution", "PCMSuperResolution", "a large panda on a purple background", factor=4),
    ),
    Demo(
        "stroke_to_image",
        "Stroke to image",
        "Rough strokes become a tree.",
        "*strength* 0.5 keeps to the strokes, 1 takes hardly more than their colours. Paint strokes of your own.",
        edited("stroke_to_image", "PCMStroke", "a large pine tree on a yellow background", 5),
    ),
    Demo(
        "denoise",
        "Denoise",
        "The noise of a bad camera is taken out; the node says how much it found.",
        "*noise* by hand: more smooths more, and draws more.",
        edited("denoise", "PCMDenoise", "a large butterfly on a white background"),
    ),
    Demo(
        "interpolate",
        "Interpolate",
        "Frames from one prompt to another, at 4 passes of the network for each. The ends are exactly the pictures of "
        "*Sample PCM*.",
        "another *seed_b*, so that the noise moves too; more *frames*.",
        partial(
            between,
            prompt="a large strawberry on a white background",
            last_prompt="a large watermelon on a blue background",
            seed_b=42,
            frames=8,
        ),
    ),
)
TEMPLATES = (demo, *(partial(each.workflow, number) for number, each in enumerate(DEMOS, 1)))
