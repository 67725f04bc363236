"""The templates that edit a picture, each as one node, and in parts with a ControlNet; and frames between prompts."""

from __future__ import annotations

from typing import Any

from host.templates.parts import (
    AS_RECOMMENDED,
    FOX,
    GIRL,
    PICTURE_WIDTH,
    SD15,
    Files,
    enlarged,
    hub_file,
    load_image,
    model_column,
    save,
    saved,
)
from host.workflows import Column, Group, Node, Workflow

THROUGH_VAE = """\
passes of the network, and at each step the VAE decodes once and encodes twice. A fast VAE of the same family, such as \
TAESD, on *step_vae* makes that cheap."""


def edit(kind: str, base: Node, lora: Node, positive: Node, negative: Node, **own: Any) -> Node:
    """An artist's editing node, with this seed unless it has its own."""
    shared = {"model": lora[0], "recipe": lora[1], "vae": base[2], "positive": positive[0], "negative": negative[0]}
    return Node(kind, 720, **{"seed": 42} | shared | own)


def picture_to_picture(
    name: str, kind: Files, note: str, node: str, prompt: str, picture: tuple[Node, ...], mask: bool = False, **own: Any
) -> Workflow:
    """A template of one artist's editing node. picture: Load Image, and what changes its picture before the edit."""
    base, lora = kind.model()
    positive, negative = kind.prompts(base, prompt, 120)
    masks = {"mask": picture[0][1]} if mask else {}
    edited = edit(node, base, lora, positive, negative, image=picture[-1][0], **masks, **own)
    return Workflow(
        name,
        note,
        (
            model_column(base, lora),
            Column(Group("Picture", *picture), Group("Prompt", positive, negative), width=PICTURE_WIDTH),
            Column(Group("Edit", edited), width=360),
            Column(Group("Result", *saved(edited[0], 540, kind.times)), width=460),
        ),
    )


def inpaint() -> Workflow:
    note = f"""\
# Inpaint

**First**: right click on *Load Image*, Open in MaskEditor, paint over what is to be drawn anew, save. The example \
comes without a mask.

{SD15.note}

**Prompt**: the whole picture as it is to be, what is new first.

**Settings**: {AS_RECOMMENDED}. All outside the mask and *grow* stays as it is, pixel for pixel. More *grow* \
hides a seam. Under the mask the colours around it flow in first; *denoise* 0.75 stays near them.

**Time**: 4 {THROUGH_VAE} *projection* latent (advanced) takes no VAE in the steps, and fits a little less well."""
    prompt = f"a blue dress with white dots, {GIRL.replace(' in a pink dress', '')}"
    return picture_to_picture("07_inpaint", SD15, note, "PCMInpaint", prompt, (load_image(),), mask=True)


def outpaint() -> Workflow:
    note = f"""\
# Outpaint

{SD15.note}

**Prompt**: the whole picture, with what is beyond its sides.

**Settings**: *left*, *top*, *right*, *bottom* are the pixels to add. The picture itself stays, pixel for pixel, but \
for a rim of *grow* pixels that is blended. Where the new part does not fit, try another seed, fewer pixels at a time, \
or a larger *grow*.

**Time**: 4 {THROUGH_VAE} *projection* latent (advanced) takes no VAE in the steps."""
    prompt = f"{GIRL}, wide landscape, trees and clouds"
    return picture_to_picture("08_outpaint", SD15, note, "PCMOutpaint", prompt, (load_image(),), left=128, right=128)


def colorize() -> Workflow:
    note = f"""\
# Colorize

{SD15.note}

**Picture**: black and white; of a coloured one, as here, only the lightness is used. Every pixel keeps it exactly.

**Prompt**: name the colours, thing by thing. The picture gives the shapes, so the prompt need not. The negative \
prompt is unused at CFG 1: say what you want, not what to avoid.

**Settings**: {AS_RECOMMENDED}. Another seed gives other colours where the prompt names none.

**Time**: 4 {THROUGH_VAE}"""
    prompt = "yellow hair, pale skin, red dress, green grass, blue sky, white clouds"
    return picture_to_picture("09_colorize", SD15, note, "PCMColorize", prompt, (load_image(),))


def super_resolution() -> Workflow:
    note = f"""\
# Super-resolution

{SD15.note}

**Picture**: for the trial it is first made four times smaller. For a small picture of your own, select *Make it \
small* and bypass it (Ctrl+B).

**Prompt**: what is to be seen. Scaled down again, the result is the picture it came from, whatever the prompt says.

**Settings**: the result is *factor* times as wide and as high. SD1.5 was made for about 512 pixels a side, SDXL for \
1024: choose a factor that comes near. *denoise* 0.5 invents less, 1 more.

**Time**: 3 {THROUGH_VAE} *denoise* 0.5 takes 2 passes, 1 takes 4."""
    image = load_image()
    small = Node("ImageScaleBy", 90, "Make it small", image=image[0], upscale_method="area", scale_by=0.25)
    return picture_to_picture("10_super_resolution", SD15, note, "PCMSuperResolution", GIRL, (image, small), factor=4)


def stroke() -> Workflow:
    note = f"""\
# Stroke to image

{SD15.note}

**Picture**: rough strokes, each in the colour of what is to be there, as in any paint program.

**Prompt**: what the strokes are to become.

**Settings**: *strength* is how much is painted. It goes in the steps of the LoRA: 0.5 keeps to the strokes, 0.75 \
paints, 1 takes hardly more than their colours.

**Image variation**: load a photograph instead, take 0.5 or 0.75, and queue with several seeds.

**Time**: as many passes of the network as the node says, 3 of 4 at *strength* 0.75; the VAE encodes and \
decodes once."""
    prompt = f"{GIRL}, oil painting, detailed"
    return picture_to_picture("11_stroke_to_image", SD15, note, "PCMStroke", prompt, (load_image(),))


def denoise() -> Workflow:
    note = f"""\
# Denoise

{SD15.note}

**Picture**: for the trial, noise is added first. For a noisy picture of your own, select *Noise for the trial* and \
bypass it (Ctrl+B).

**Prompt**: what is to be seen.

**Settings**: *noise* 0 estimates how noisy the picture is, and the node says what it found, in levels of 255. Give a \
number where the estimate is off: more smooths more, and draws more.

**Time**: as many passes of the network as the node says; the VAE decodes once."""
    image = load_image()
    noisy = Node("ImageAddNoise", 110, "Noise for the trial", image=image[0], seed=7, strength=0.1).fixed()
    return picture_to_picture("12_denoise", SD15, note, "PCMDenoise", GIRL, (image, noisy))


def between(name: str, kind: Files, note: str, prompt: str, last_prompt: str, **own: Any) -> Workflow:
    """A template of the frames from one prompt to another."""
    base, lora = kind.model()
    first, negative = kind.prompts(base, prompt)
    first.title = "First prompt"
    last = kind.prompt(base, last_prompt, "Last prompt")
    empty = kind.empty_latent()
    frames = edit("PCMInterpolate", base, lora, first, negative, positive_b=last[0], latent_image=empty[0], **own)
    larger = enlarged(frames[0], kind.times)
    moving = Node(
        "SaveAnimatedWEBP", 560, images=(*larger, frames)[0][0], filename_prefix="pcm", fps=8.0, lossless=False
    )
    return Workflow(
        name,
        note,
        (
            model_column(base, lora),
            Column(Group("Prompts and size", first, last, negative, empty)),
            Column(Group("Frames", frames), width=360),
            Column(Group("Result", *larger, moving), width=460),
        ),
    )


def interpolate() -> Workflow:
    note = f"""\
# Interpolate

{SD15.note}

**Frames**: from the first prompt and *seed* to the last prompt and *seed_b*. The two ends are exactly the pictures \
that *Sample PCM* makes of them. With the same seed only the prompt moves; with the same prompt only the noise.

**Settings**: {AS_RECOMMENDED}. More *frames* go over more smoothly. Put Save Image in place of the last node \
for the single frames.

**Time**: 4 passes of the network for each frame."""
    return between(
        "13_interpolate",
        SD15,
        note,
        FOX,
        FOX.replace("fresh snow, morning", "autumn leaves, evening"),
        seed_b=43,
        frames=16,
    )


def inpaint_with_controlnet() -> Workflow:
    base, lora = SD15.model()
    file = hub_file(
        "controlnet", "comfyanonymous/ControlNet-v1-1_fp16_safetensors", "control_v11p_sd15_canny_fp16.safetensors"
    )
    net = Node("ControlNetLoader", 80, control_net_name=file.name).of(*file.entries)
    image = load_image()
    lines = Node("Canny", 90, image=image[0])
    positive, negative = SD15.prompts(base, f"a blue velvet dress, {GIRL.replace(' in a pink dress', '')}")
    guided = Node(
        "ControlNetApplyAdvanced",
        190,
        positive=positive[0],
        negative=negative[0],
        control_net=net[0],
        image=lines[0],
        strength=0.8,
    )
    operator = Node("PCMInpaintOperator", 150, image=image[0], mask=image[1])
    start = Node("VAEEncode", 50, pixels=operator[1], vae=base[2])
    sampler = Node("PCMEditSampler", 200, operator=operator[0], vae=base[2], recipe=lora[1])
    levels = Node("PCMScheduler", 220, recipe=lora[1])
    noise = Node("RandomNoise", 90, noise_seed=42)
    guider = Node("CFGGuider", 100, model=lora[0], positive=guided[0], negative=guided[1], cfg=1.0)
    sampled = Node(
        "SamplerCustomAdvanced",
        360,
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=levels[0],
        latent_image=start[0],
    )
    decoded = Node("PCMEditDecode", 170, operator=operator[0], vae=base[2], samples=sampled[0])
    note = f"""\
# Inpaint from parts, with ControlNet

What *PCM Inpaint* does in one node, with room in between: here a ControlNet keeps the outlines of what the mask \
covers, and the prompt gives it another look.

**First**: right click on *Load Image*, Open in MaskEditor, paint over the dress, save.

{SD15.note}
- models/controlnet: a Canny ControlNet for SD1.5, here {file.name} \
(comfyanonymous/ControlNet-v1-1_fp16_safetensors on Hugging Face)

**Try**: another *PCM ... Operator* for another edit; other LoRAs after *Load PCM LoRA*; another guider. *PCM \
Edit Sampler* and *PCM Edit Decode* take the same operator.

**Settings**: *cfg* of *CFG Guider* as *Load PCM LoRA* says.

**Time**: 4 passes of the network, each with the ControlNet, and at each step the VAE decodes once and encodes twice; \
a fast one such as TAESD on *PCM Edit Sampler* makes that cheap."""
    return Workflow(
        "14_inpaint_with_controlnet",
        note,
        (
            model_column(base, lora, width=480),
            Column(Group("Picture and edit", image, operator, sampler, levels)),
            Column(Group("Prompt and outlines", positive, negative, lines, net, guided, noise, guider), width=460),
            Column(Group("Sample", start, sampled), Group("Result", decoded, save(decoded[0], 320)), width=380),
        ),
    )


TEMPLATES = (
    inpaint,
    outpaint,
    colorize,
    super_resolution,
    stroke,
    denoise,
    interpolate,
    inpaint_with_controlnet,
)
