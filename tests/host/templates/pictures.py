"""The templates that draw pictures: from text in each family, side by side, from a picture, larger."""

from __future__ import annotations

from host.templates.parts import (
    AS_RECOMMENDED,
    DEMO,
    FOX,
    GIRL,
    PASSES,
    SD3,
    SD15,
    SD15_NORMAL,
    SDXL,
    Files,
    decode,
    finished,
    load_image,
    prompts,
    sample,
    save,
)
from host.workflows import Column, Node, Workflow
from phased_consistency.samplers.emoji_words import GROUNDS, THINGS


def demo() -> Workflow:
    note = f"""\
# Try it, without a checkpoint

A tiny base that draws emoji, and a 4-step LoRA for it: a picture takes seconds on a CPU.

{DEMO.note}

*make comfy* in this pack's folder puts both there and starts ComfyUI. Into a ComfyUI that you have, in this \
pack's folder and with its Python: *python -m pip install -e .*, then *python -m \
phased_consistency.trainer.tiny.comfy FOLDER*, with its folder.

**Prompt**: the base has no text encoders. *PCM Demo Prompt* takes their place. It knows one thing, \
which may be large, or two, of which one is left or right of the other, on a background:
- {", ".join(THINGS)};
- on {", ".join(GROUNDS)}, or on striped, dotted or checkered blue, and so on.

**Settings**: none to find: {AS_RECOMMENDED}; *Load PCM LoRA* and *Sample PCM* write what they do on themselves.

**Size**: 128 x 128, four pictures at once, shown four times as large."""
    base, lora = DEMO.model(400)
    positive = Node("PCMDemoPrompt", 260, "Positive prompt", text="a large fox on a blue background")
    negative = Node("PCMDemoPrompt", 200, "Negative prompt (unused at CFG 1)", text="")
    empty = DEMO.empty_latent(4)
    sampled = sample(lora, positive, negative, empty)
    decoded = decode(sampled, base)
    large = Node("ImageScaleBy", 90, image=decoded[0], upscale_method="nearest-exact", scale_by=4.0)
    return Workflow(
        "00_demo",
        note,
        (
            Column("Model", base, lora, gap=60),
            Column("Prompt and size", positive, negative, empty, gap=60),
            Column("Sample", sampled, decoded, large, width=420, gap=60),
            Column("Result", save(large[0], 780), width=680),
        ),
    )


def text_to_image(name: str, kind: Files, prompt: str, note: str) -> Workflow:
    base, lora = kind.model()
    positive, negative = prompts(base, prompt)
    empty = kind.empty_latent()
    sampled = sample(lora, positive, negative, empty)
    return Workflow(
        name,
        f"# {kind.family}: text to image in 4 steps\n\n{kind.note}\n\n{note}",
        (
            Column("Model", base, lora, gap=60),
            Column("Prompt and size", positive, negative, empty),
            Column("Sample", sampled, width=420),
            finished(sampled, base),
        ),
    )


def sd15() -> Workflow:
    note = f"""\
**Settings**: none to find: {AS_RECOMMENDED}; both PCM nodes write what they do on themselves.

**Time**: {PASSES}"""
    return text_to_image("01_text_to_image_sd15", SD15, FOX, note)


def sdxl() -> Workflow:
    note = f"""\
**Settings**: none to find: {AS_RECOMMENDED}.

**A black picture**: the VAE ran in half precision, which SDXL's own does not bear. Start ComfyUI without \
*--fp16-vae*, or load sdxl-vae-fp16-fix (madebyollin on Hugging Face) with *Load VAE*.

**Time**: {PASSES}"""
    prompt = "a lighthouse on a cliff at dusk, storm clouds, warm light in the window, photograph"
    return text_to_image("02_text_to_image_sdxl", SDXL, prompt, note)


def sd3() -> Workflow:
    note = """\
**Settings**: none to find. The LoRA brings its shift, so ModelSamplingSD3 is not needed. It is for SD3 medium, not \
for SD3.5.

**Negative prompt**: leave it empty, as the LoRA's authors do.

**Time**: 4 steps at CFG 1.2 are 8 passes of the network, where 28 steps with CFG take 56. CFG 1 takes 4."""
    prompt = 'a bakery window with a sign that says "open", loaves of bread, morning light, photograph'
    return text_to_image("03_text_to_image_sd3", SD3, prompt, note)


def compare_steps() -> Workflow:
    note = f"""\
# Compare step counts

The same seed and prompt at 1, 2, 4 and 8 steps, in one grid that says what each cost. Beside it the checkpoint \
without the LoRA, at 25 steps.

{SD15.note}

**What to look for**: a LoRA made for 4 steps is best at 4. Fewer merge its phases, more divide them.

**Settings**: *step_counts* and *modes* are lists with commas, such as *deterministic, stochastic, gamma 0.3*: every \
mode is drawn at every step count. Each picture is exactly that of *Sample PCM*.

**Time**: 15 passes for each picture of the batch, and 50 for the checkpoint alone. To leave that out, select *25 \
steps without the LoRA* and bypass it (Ctrl+B), with what follows it."""
    base, lora = SD15.model()
    positive, negative = prompts(base, "a hummingbird at a red flower, macro photograph")
    negative.title = "Negative prompt (without the LoRA)"
    empty = SD15.empty_latent(2)
    links = {"positive": positive[0], "negative": negative[0], "latent_image": empty[0]}
    compared = Node("PCMCompare", 760, model=lora[0], recipe=lora[1], vae=base[2], seed=42, **links)
    slow = Node(
        "KSampler",
        490,
        "25 steps without the LoRA",
        model=base[0],
        seed=42,
        steps=25,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        **links,
    )
    decoded = decode(slow, base)
    return Workflow(
        "04_compare_steps",
        note,
        (
            Column("Model", base, lora, gap=60),
            Column("Prompt and size", positive, negative, empty),
            Column("Compare", compared, width=420),
            Column("Result", save(compared[0]), width=560),
            Column("Without the LoRA", slow, decoded, Node("PreviewImage", 320, images=decoded[0])),
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
    base, lora = SD15.model()
    positive, negative = prompts(base, f"{GIRL}, watercolour on rough paper", 120)
    image = load_image()
    scaled = Node("ImageScale", 180, image=image[0], upscale_method="lanczos", width=512, height=0, crop="disabled")
    encoded = Node("VAEEncode", 50, pixels=scaled[0], vae=base[2])
    sampled = sample(lora, positive, negative, encoded, denoise=0.5)
    return Workflow(
        "05_image_to_image",
        note,
        (
            Column("Model", base, lora, gap=60),
            Column("Picture", image, scaled, encoded),
            Column("Prompt", positive, negative),
            Column("Sample", sampled, width=420),
            finished(sampled, base, 620),
        ),
    )


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
    positive, negative = prompts(base, "a walled town on a hill above the sea, golden hour, detailed matte painting")
    empty = SD15.empty_latent()
    first = sample(lora, positive, negative, empty, "First pass")
    small = decode(first, base)
    large = Node("ImageScaleBy", 90, image=small[0], upscale_method="lanczos", scale_by=2.0)
    encoded = Node("VAEEncode", 50, pixels=large[0], vae=base[2])
    second = sample(lora, positive, negative, encoded, "Second pass", denoise=0.5)
    decoded = decode(second, base)
    return Workflow(
        "06_hires_pass",
        note,
        (
            Column("Model", base, lora, gap=60),
            Column("Prompt and size", positive, negative, empty),
            Column("First pass", first, small, width=420),
            Column("Larger", Node("PreviewImage", 340, images=small[0]), large, encoded),
            Column("Second pass", second, decoded, width=420),
            Column("Result", save(decoded[0]), width=560),
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
    positive, negative = prompts(
        base, "portrait of an old sailor, oil painting", negative="hat, beard, blurry, low contrast"
    )
    empty = SD15_NORMAL.empty_latent()
    scheduled = Node("PCMCFGSchedule", 340, model=lora[0], recipe=lora[1], to_step=4)
    sampled = sample(lora, positive, negative, empty, model=scheduled[0])
    return Workflow(
        "15_cfg_schedule",
        note,
        (
            Column("Model", base, lora, gap=60),
            Column("Prompt and size", positive, negative, empty),
            Column("CFG", scheduled),
            Column("Sample", sampled, width=420),
            finished(sampled, base),
        ),
    )


TEMPLATES = (demo, sd15, sdxl, sd3, compare_steps, image_to_image, hires_pass)
