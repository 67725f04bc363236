"""The templates for today's transformers, whose network, text encoders and autoencoder are files of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from host.templates.parts import (
    AS_RECOMMENDED,
    FOX,
    File,
    decode,
    finished,
    hub_file,
    load_lora,
    model_column,
    sample,
)
from host.workflows import Column, Group, Node, Out, Workflow

SHIFT = "The LoRA brings its shift: ModelSamplingAuraFlow, ModelSamplingSD3 and ModelSamplingFlux are not needed."


def split_file(repository: str, folder: str, name: str) -> File:
    """A file of one of ComfyUI's own repositories."""
    return hub_file(folder, f"Comfy-Org/{repository}", f"split_files/{folder}/{name}")


@dataclass(frozen=True)
class Model:
    """A transformer's files, and how ComfyUI calls its text encoders."""

    networks: tuple[File, ...]
    encoders: tuple[File, ...]
    vae: File
    kind: str
    loras: tuple[File, ...] = ()

    @property
    def note(self) -> str:
        files = (*self.networks, *self.loras, *self.encoders, self.vae)
        return "**Files**\n" + "\n".join(dict.fromkeys(file.line for file in files))

    def network(self, i: int = 0) -> Node:
        file = self.networks[i]
        return Node("UNETLoader", 90, unet_name=file.name, weight_dtype="default").of(*file.entries)

    def lora(self, model: Out, i: int = 0) -> Node:
        return load_lora(model, self.loras[i], lines=4)

    def clip(self) -> Node:
        names = [file.name for file in self.encoders]
        entries = [entry for file in self.encoders for entry in file.entries]
        if len(names) == 2:
            inputs = {"clip_name1": names[0], "clip_name2": names[1]}
            return Node("DualCLIPLoader", 130, type=self.kind, **inputs).of(*entries)
        return Node("CLIPLoader", 110, clip_name=names[0], type=self.kind).of(*entries)

    def autoencoder(self) -> Node:
        return Node("VAELoader", 60, vae_name=self.vae.name).of(*self.vae.entries)


def words(clip: Node, text: str) -> tuple[Node, Node]:
    """The prompts; the negative one is empty, and not used at CFG 1."""
    return (
        Node("CLIPTextEncode", 140, "Positive prompt", clip=clip[0], text=text),
        Node("CLIPTextEncode", 90, "Negative prompt (unused at CFG 1)", clip=clip[0], text=""),
    )


FLUX_ENCODERS = "comfyanonymous/flux_text_encoders"
TURBO_ALPHA = hub_file("loras", "alimama-creative/FLUX.1-Turbo-Alpha", "diffusion_pytorch_model.safetensors")
FLUX = Model(
    (hub_file("diffusion_models", "Comfy-Org/flux1-dev", "flux1-dev.safetensors"),),
    (
        hub_file("text_encoders", FLUX_ENCODERS, "clip_l.safetensors"),
        hub_file("text_encoders", FLUX_ENCODERS, "t5xxl_fp8_e4m3fn_scaled.safetensors"),
    ),
    split_file("Lumina_Image_2.0_Repackaged", "vae", "ae.safetensors"),
    "flux",
    (replace(TURBO_ALPHA, name="FLUX.1-Turbo-Alpha.safetensors"),),
)
QWEN = Model(
    (split_file("Qwen-Image_ComfyUI", "diffusion_models", "qwen_image_fp8_e4m3fn.safetensors"),),
    (split_file("Qwen-Image_ComfyUI", "text_encoders", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),),
    split_file("Qwen-Image_ComfyUI", "vae", "qwen_image_vae.safetensors"),
    "qwen_image",
    (hub_file("loras", "lightx2v/Qwen-Image-Lightning", "Qwen-Image-Lightning-4steps-V1.0.safetensors"),),
)
ZIMAGE = Model(
    (split_file("z_image_turbo", "diffusion_models", "z_image_turbo_bf16.safetensors"),),
    (split_file("z_image_turbo", "text_encoders", "qwen_3_4b.safetensors"),),
    split_file("z_image_turbo", "vae", "ae.safetensors"),
    "lumina2",
)
WAN_REPOSITORY = "Wan_2.2_ComfyUI_Repackaged"
NOISES = ("high", "low")
WAN = Model(
    tuple(
        split_file(WAN_REPOSITORY, "diffusion_models", f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors")
        for noise in NOISES
    ),
    (split_file("Wan_2.1_ComfyUI_repackaged", "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),),
    split_file("Wan_2.1_ComfyUI_repackaged", "vae", "wan_2.1_vae.safetensors"),
    "wan",
    tuple(
        split_file(WAN_REPOSITORY, "loras", f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors")
        for noise in NOISES
    ),
)


def flux_turbo() -> Workflow:
    note = f"""\
# FLUX.1: text to image in 8 steps

{FLUX.note}
- save the LoRA under the name here: at its place it has one that tells nothing

**Settings**: none to find: {AS_RECOMMENDED}. The shift follows the size of the picture, as its authors have it. {SHIFT}

**Guidance**: FLUX takes it from the prompt. *FluxGuidance* sets it, 3.5 for this LoRA; CFG stays at 1, and the \
negative prompt is not used.

**Hyper-FLUX** goes the same way: put Hyper-FLUX.1-dev-8steps-lora in the place of the LoRA, at strength 0.125."""
    network, clip, vae = FLUX.network(), FLUX.clip(), FLUX.autoencoder()
    lora = FLUX.lora(network[0])
    positive, negative = words(clip, FOX)
    guided = Node("FluxGuidance", 60, conditioning=positive[0], guidance=3.5)
    empty = Node("EmptySD3LatentImage", 110, width=1024, height=1024, batch_size=1)
    sampled = sample(lora, guided, negative, empty)
    return Workflow(
        "16_flux_turbo",
        note,
        (
            model_column(network, lora),
            Column(Group("Prompt and size", clip, positive, guided, negative, empty), width=380),
            Column(Group("Sample", sampled), width=360),
            finished(sampled, vae[0], vae),
        ),
    )


def qwen_lightning() -> Workflow:
    note = f"""\
# Qwen-Image: text to image in 4 steps

{QWEN.note}

**Settings**: none to find: {AS_RECOMMENDED}. {SHIFT}

**Other files**: Qwen-Image-Lightning has files for 4 and for 8 steps, V1 and V2, and for Qwen-Image-Edit. Each is \
known by its name. With the editing model, *TextEncodeQwenImageEditPlus* takes the place of the prompts.

**Time**: 4 passes of the network, where 50 steps with CFG take 100."""
    network, clip, vae = QWEN.network(), QWEN.clip(), QWEN.autoencoder()
    lora = QWEN.lora(network[0])
    positive, negative = words(clip, 'a bakery window with a sign that says "open", loaves of bread, morning light')
    empty = Node("EmptySD3LatentImage", 110, width=1328, height=1328, batch_size=1)
    sampled = sample(lora, positive, negative, empty)
    return Workflow(
        "17_qwen_image_lightning",
        note,
        (
            model_column(network, lora),
            Column(Group("Prompt and size", clip, positive, negative, empty), width=380),
            Column(Group("Sample", sampled), width=360),
            finished(sampled, vae[0], vae),
        ),
    )


def zimage_turbo() -> Workflow:
    note = f"""\
# Z-Image-Turbo: text to image in 8 steps, without a LoRA

{ZIMAGE.note}

**PCM Recipe**: the model is made for few steps itself. The node knows it by its file's name and hands on how it is \
sampled. It does so for FLUX.1 schnell, FLUX.2 klein, LTX-2 distilled, SD3.5 Large Turbo and merged checkpoints, too.

**A model that it does not know**: set *recipe* to widgets, and *phases* to its number of steps. Where its authors \
list noise levels or timesteps, write them into *sigmas* or *timesteps*.

**A LoRA on it**: load it with any loader, before *PCM Recipe*.

**Z-Image itself**, not Turbo: *Load PCM LoRA* with Z-Image-Fun-Lora-Distill-8-Steps, at strength 0.8."""
    network, clip, vae = ZIMAGE.network(), ZIMAGE.clip(), ZIMAGE.autoencoder()
    recipe = Node("PCMRecipe", 420, model=network[0])
    positive, negative = words(clip, "a lighthouse on a cliff at dusk, storm clouds, warm light in the window")
    empty = Node("EmptySD3LatentImage", 110, width=1024, height=1024, batch_size=1)
    sampled = sample(recipe, positive, negative, empty)
    return Workflow(
        "18_z_image_turbo",
        note,
        (
            model_column(network, recipe),
            Column(Group("Prompt and size", clip, positive, negative, empty)),
            Column(Group("Sample", sampled), width=360),
            finished(sampled, vae[0], vae),
        ),
    )


def wan_lightning() -> Workflow:
    note = f"""\
# Wan 2.2: text to video in 4 steps, with two experts

{WAN.note}

**Two experts**: one model draws the noisy levels, one the rest. Each has its own LoRA. The high-noise one goes to \
*model* and brings the recipe; the low-noise one goes to *low_noise_model*. *Sample PCM* says how many steps are \
whose, and which is where if they are swapped. The first leaves the memory before the second comes in.

**Settings**: none to find: {AS_RECOMMENDED}. {SHIFT}

**Image to video**: take the i2v models and LoRAs, and *WanImageToVideo* between the prompts and *Sample PCM*."""
    networks = [WAN.network(i) for i in range(2)]
    loras = [WAN.lora(network[0], i) for i, network in enumerate(networks)]
    clip, vae = WAN.clip(), WAN.autoencoder()
    positive, negative = words(clip, "a red fox walks through fresh snow, morning light, the camera follows")
    empty = Node("EmptyHunyuanLatentVideo", 130, width=640, height=640, length=81, batch_size=1)
    sampled = sample(loras[0], positive, negative, empty, low_noise_model=loras[1][0])
    decoded = decode(sampled, vae[0])
    video = {"filename_prefix": "pcm", "fps": 16.0, "lossless": False, "quality": 90, "method": "default"}
    saved = Node("SaveAnimatedWEBP", 480, images=decoded[0], **video)
    return Workflow(
        "19_wan22_two_experts",
        note,
        (
            model_column(networks[0], loras[0], title="High-noise model", width=490),
            Column(
                Group("Prompt", clip, positive, negative), Group("Low-noise model", networks[1], loras[1]), width=490
            ),
            Column(Group("Sample", empty, sampled), width=350),
            Column(Group("Result", vae, decoded, saved), width=340),
        ),
    )


TEMPLATES = (flux_turbo, qwen_lightning, zimage_turbo, wan_lightning)
