"""The templates that draw pictures: from text in each family, side by side, from a picture, larger."""

from __future__ import annotations

from typing import Any

from host.templates.parts import (
    AS_RECOMMENDED,
    FOX,
    GIRL,
    MODEL_WIDTH,
    PASSES,
    PICTURE_WIDTH,
    SD3,
    SD15,
    SD15_NORMAL,
    SDXL,
    Files,
    decode,
    enlarged,
    finished,
    load_image,
    model_column,
    sample,
    save,
    scaled,
)
from host.workflows import Column, Group, Node, Workflow


def text_to_image(name: str, kind: Files, prompt: str, note: str, batch: int = 1, width: int = MODEL_WIDTH) -> Workflow:
    """width: of the first column, for a long note."""
    base, lora = kind.model()
    positive, negative = kind.prompts(base, prompt)
    empty = kind.empty_latent(batch)
    sampled = sample(lora, positive, negative, empty)
    return Workflow(
        name,
        note,
        (
            model_column(base, lora, width=width),
            Column(Group("Prompt and size", positive, negative, empty)),
            Column(Group("Sample", sampled), width=360),
            finished(sampled, base[2], times=kind.times),
        ),
    )


def published(name: str, kind: Files, prompt: str, note: str) -> Workflow:
    """Text to image with files that people have."""
    return text_to_image(name, kind, prompt, f"# {kind.family}: text to image in 4 steps\n\n{kind.note}\n\n{note}")


def sd15() -> Workflow:
    note = f"""\
**Settings**: none to find: {AS_RECOMMENDED}; both PCM nodes write what they do on themselves.

**Time**: {PASSES}"""
    return published("01_text_to_image_sd15", SD15, FOX, note)


def sdxl() -> Workflow:
    note = f"""\
**Settings**: none to find: {AS_RECOMMENDED}.

**A black picture**: the VAE ran in half precision, which SDXL's own does not bear. Start ComfyUI without \
*--fp16-vae*, or load sdxl-vae-fp16-fix (madebyollin on Hugging Face) with *Load VAE*.

**Time**: {PASSES}"""
    prompt = "a lighthouse on a cliff at dusk, storm clouds, warm light in the window, photograph"
    return published("02_text_to_image_sdxl", SDXL, prompt, note)


def sd3() -> Workflow:
    note = """\
**Settings**: none to find. The LoRA brings its shift, so ModelSamplingSD3 is not needed. It is for SD3 medium, not \
for SD3.5.

**Negative prompt**: leave it empty, as the LoRA's authors do.

**Time**: 4 steps at CFG 1.2 are 8 passes of the network, where 28 steps with CFG take 56. CFG 1 takes 4."""
    prompt = 'a bakery window with a sign that says "open", loaves of bread, morning light, photograph'
    return published("03_text_to_image_sd3", SD3, prompt, note)


def compare(name: str, kind: Files, prompt: str, note: str, steps: int, **sampler: Any) -> Workflow:
    """Step counts side by side, and the checkpoint alone at so many steps. sampler: its inputs."""
    base, lora = kind.model()
    positive, negative = kind.prompts(base, prompt)
    negative.title = "Negative prompt (without the LoRA)"
    empty = kind.empty_latent(2)
    links = {"positive": positive[0], "negative": negative[0], "latent_image": empty[0]}
    compared = Node("PCMCompare", 620, model=lora[0], recipe=lora[1], vae=base[2], seed=42, **links).fixed()
    title = f"{steps} steps without the LoRA"
    slow = Node("KSampler", 540, title, model=base[0], seed=42, steps=steps, **links, **sampler).fixed()
    decoded = decode(slow, base[2])
    larger = enlarged(decoded[0], kind.times)
    shown = Node("PreviewImage", 300, images=(*larger, decoded)[0][0])
    return Workflow(
        name,
        note,
        (
            model_column(base, lora),
            Column(Group("Prompt", positive, negative), Group("Without the LoRA", slow)),
            Column(Group("Size", empty), Group("Compare", compared), width=380),
            Column(
                Group("Result", save(compared[0], 400)),
                Group("Result without the LoRA", decoded, *larger, shown),
                width=480,
            ),
        ),
    )


def compare_steps() -> Workflow:
    note = f"""\
# Compare step counts

The same seed and prompt at 1, 2, 4 and 8 steps, in one grid that says what each cost. Beside it the checkpoint \
without the LoRA, at 25 steps.

{SD15.note}

**What to look for**: a LoRA made for 4 steps is best at 4. Fewer merge its phases, more divide them.

**Settings**: *step_counts* and *modes* are lists with commas, such as *deterministic, stochastic, gamma 0.3*: every \
mode is drawn at every step count. Each picture is exactly that of *Sample PCM*.

**Time**: 15 passes for each picture of the batch, and 50 for the checkpoint alone. To leave that out, bypass *25 \
steps without the LoRA* (Ctrl+B), and what follows it."""
    return compare(
        "04_compare_steps",
        SD15,
        "a hummingbird at a red flower, macro photograph",
        note,
        25,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    )


def from_picture(name: str, kind: Files, prompt: str, note: str, picture: tuple[Node, ...], seed: int = 42) -> Workflow:
    """Half of the LoRA's steps, from a picture. picture: Load Image, and what changes its picture before."""
    base, lora = kind.model()
    positive, negative = kind.prompts(base, prompt, 120)
    encoded = Node("VAEEncode", 50, pixels=picture[-1][0], vae=base[2])
    sampled = sample(lora, positive, negative, encoded, denoise=0.5, seed=seed)
    return Workflow(
        name,
        note,
        (
            model_column(base, lora),
            Column(Group("Picture", *picture), Group("Prompt", positive, negative), width=PICTURE_WIDTH),
            Column(Group("Sample", encoded, sampled), width=360),
            finished(sampled, base[2], times=kind.times),
        ),
    )


def image_to_image() -> Workflow:
    note = f"""\
# Image to image

{SD15.note}

**Picture**: it is scaled to 512 pixels of width, for which SD1.5 was made; SDXL and SD3 want 1024.

**Prompt**: the whole picture as it is to be.

**Settings**: *denoise* is how much is drawn anew. A few-step LoRA knows a few levels of noise only, so it goes in \
the LoRA's steps: 0.25, 0.5, 0.75 and 1 for 4 steps. Any other starts at the nearest of these, and the node says so. \
0.25 changes details, 0.5 the look, 0.75 what is to be seen; 1 takes hardly more than the colours. *KSampler* starts \
in between, on levels that the LoRA was not made for.

**More levels**: an 8-step LoRA has eight, and an LCM-like one about fifty.

**Time**: *denoise* 0.5 takes 2 passes of the network, of 4."""
    picture = load_image()
    prompt = f"{GIRL}, watercolour on rough paper"
    return from_picture("05_image_to_image", SD15, prompt, note, (picture, scaled(picture, 512, 0)))


def hires_pass() -> Workflow:
    note = f"""\
# A larger picture in two passes

Text to image at the size that the checkpoint was made for, then twice as large with the details drawn anew.

{SD15.note}

**Why two**: at 1024 pixels at once SD1.5 draws things twice.

**Settings**: *denoise* of the second pass is 0.5. 0.25 changes less, and is right where 0.5 draws something twice. \
Both are edges of the LoRA's steps, on which it was trained; any other moves to the nearest edge, and the node says so.

**Larger how**: as a picture, decoded and encoded again. A latent that is scaled itself turns out blurred or blotched, \
and two steps do not mend that. An upscale model (*Upscale Image using Model*) in place of *Upscale Image By* gives \
sharper edges to begin with.

**Time**: 4 small passes of the network, and 2 with four times the pixels. *10_super_resolution* enlarges a picture \
that is to stay what it is."""
    base, lora = SD15.model()
    positive, negative = SD15.prompts(
        base, "a walled town on a hill above the sea, golden hour, detailed matte painting"
    )
    empty = SD15.empty_latent()
    first = sample(lora, positive, negative, empty, "First pass")
    small = decode(first, base[2])
    large = Node("ImageScaleBy", 90, image=small[0], upscale_method="lanczos", scale_by=2.0)
    encoded = Node("VAEEncode", 50, pixels=large[0], vae=base[2])
    second = sample(lora, positive, negative, encoded, "Second pass", denoise=0.5).fixed()
    decoded = decode(second, base[2])
    return Workflow(
        "06_hires_pass",
        note,
        (
            model_column(base, lora),
            Column(Group("Prompt and size", positive, negative, empty), Group("Larger", small, large, encoded)),
            Column(Group("First pass", first), Group("First picture", Node("PreviewImage", 320, images=small[0]))),
            Column(Group("Second pass", second), Group("Result", decoded, save(decoded[0], 320)), width=400),
        ),
    )


def cfg_schedule() -> Workflow:
    note = f"""\
# CFG on the first steps only

A *normalcfg* LoRA works with CFG and with negative prompts, as the checkpoint does, and each step then takes two \
passes. *PCM CFG schedule* leaves the second one out on the steps that you choose.

{SD15_NORMAL.note}

**Settings**: *from_step* 1 and *to_step* 4 guide the noisier half, where the picture's layout is decided. *to_step* 0 \
guides all. *cfg* 0 means as the LoRA recommends, here 4.5; the CFG of *Sample PCM* is not used.

**Negative prompt**: used on the guided steps.

**Time**: 12 passes of the network; 16 with CFG on all 8 steps. The node counts them."""
    base, lora = SD15_NORMAL.model()
    positive, negative = SD15_NORMAL.prompts(
        base, "portrait of an old sailor, oil painting", negative="hat, beard, blurry, low contrast"
    )
    empty = SD15_NORMAL.empty_latent()
    scheduled = Node("PCMCFGSchedule", 300, model=lora[0], recipe=lora[1], to_step=4)
    sampled = sample(lora, positive, negative, empty, model=scheduled[0])
    return Workflow(
        "15_cfg_schedule",
        note,
        (
            model_column(base, lora),
            Column(Group("Prompt and size", positive, negative, empty), Group("CFG", scheduled)),
            Column(Group("Sample", sampled), width=360),
            finished(sampled, base[2]),
        ),
    )


TEMPLATES = (sd15, sdxl, sd3, compare_steps, image_to_image, hires_pass)
