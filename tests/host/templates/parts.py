"""What several templates have: the files that people have, the nodes that load them, and what the notes say of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from host.workflows import Column, Group, Node, Out
from phased_consistency.trainer.tiny.comfy import CHECKPOINT, LORA

PASSES = "4 passes of the network, where 25 steps with CFG take 50."
AS_RECOMMENDED = "steps 0 and CFG 0 mean as the LoRA recommends"
GIRL = "a girl with long yellow hair in a pink dress on a green hill, blue sky"
FOX = "a red fox asleep in fresh snow, morning light, photograph"
HUB = "https://huggingface.co/"
MODEL_WIDTH, PICTURE_WIDTH = 430, 400  # of columns, for the names of files


@dataclass(frozen=True)
class File:
    """A file of a model: its name, its folder in models/, and where it is; none for what this pack brings."""

    name: str
    folder: str
    url: str = ""

    @property
    def entries(self) -> tuple[dict[str, str], ...]:
        """As the frontend reads it, which offers to get what is missing."""
        return ({"name": self.name, "url": self.url, "directory": self.folder},) if self.url else ()

    @property
    def line(self) -> str:
        """A line of a note: the file, and its repository."""
        repository = "/".join(self.url.removeprefix(HUB).split("/")[:2])
        return f"- models/{self.folder}: {self.name} ({repository} on Hugging Face)"


@dataclass(frozen=True)
class Files:
    """A checkpoint and a few-step LoRA for it, as a template names them.

    family: as people write it. of, lora_of: what the note says of where they come from, and of others that will do.
    side: of the pictures that the checkpoint was made for, in pixels. encoder: the node that reads prompts. times: how
    many times as large a picture is shown.
    """

    family: str
    checkpoint: File
    of: str
    lora: File
    lora_of: str
    side: int = 512
    empty: str = "EmptyLatentImage"
    encoder: str = "CLIPTextEncode"
    times: int = 1

    @property
    def note(self) -> str:
        """What the note says of them, as a list that others may be added to."""
        return (
            f"**Files**\n- models/checkpoints: {self.of}, here {self.checkpoint.name}\n"
            f"- models/loras: {self.lora_of}, here {self.lora.name}"
        )

    def model(self) -> tuple[Node, Node]:
        """The checkpoint and its LoRA."""
        base = Node("CheckpointLoaderSimple", 100, ckpt_name=self.checkpoint.name).of(*self.checkpoint.entries)
        return base, load_lora(base[0], self.lora)

    def prompt(self, base: Node, text: str, title: str, height: int = 140) -> Node:
        """A prompt's node; the demo's says something besides, and is higher for it."""
        if self.encoder != "CLIPTextEncode":
            return Node(self.encoder, 190, title, text=text)
        return Node(self.encoder, height, title, clip=base[1], text=text)

    def prompts(self, base: Node, positive: str, height: int = 140, negative: str = "") -> tuple[Node, Node]:
        unused = "" if negative else " (unused at CFG 1)"
        return (
            self.prompt(base, positive, "Positive prompt", height),
            self.prompt(base, negative, f"Negative prompt{unused}", 100),
        )

    def empty_latent(self, batch: int = 1) -> Node:
        return Node(self.empty, 110, width=self.side, height=self.side, batch_size=batch)


def _published(steps: int, family: str, folder: str, size: int) -> str:
    return (
        f"{'an' if steps == 8 else 'a'} {steps}-step PCM LoRA for {family} ({size} MB, in the folder {folder} of "
        "wangfuyun/PCM_Weights on Hugging Face), or one you made with this pack's trainer"
    )


def hub_file(folder: str, repository: str, path: str) -> File:
    """A file of a repository on Hugging Face, for a folder in models/."""
    return File(path.split("/")[-1], folder, f"{HUB}{repository}/resolve/main/{path}")


def pcm_lora(path: str) -> File:
    return hub_file("loras", "wangfuyun/PCM_Weights", path)


SD15_FILE = hub_file("checkpoints", "Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors")
ANY_SD15 = "any SD1.5 checkpoint (Comfy-Org/stable-diffusion-v1-5-archive on Hugging Face has the first one)"
SD15 = Files(
    "SD1.5",
    SD15_FILE,
    ANY_SD15,
    pcm_lora("sd15/pcm_sd15_smallcfg_4step_converted.safetensors"),
    _published(4, "SD1.5", "sd15", 135),
)
SD15_NORMAL = Files(
    "SD1.5",
    SD15_FILE,
    ANY_SD15,
    pcm_lora("sd15/pcm_sd15_normalcfg_8step_converted.safetensors"),
    _published(8, "SD1.5 that works with CFG", "sd15", 135),
)
SDXL = Files(
    "SDXL",
    hub_file("checkpoints", "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
    "any SDXL checkpoint (stabilityai/stable-diffusion-xl-base-1.0 on Hugging Face has the first one)",
    pcm_lora("sdxl/pcm_sdxl_smallcfg_4step_converted.safetensors"),
    _published(4, "SDXL", "sdxl", 394),
    1024,
)
SD3 = Files(
    "SD3",
    hub_file("checkpoints", "stabilityai/stable-diffusion-3-medium", "sd3_medium_incl_clips_t5xxlfp8.safetensors"),
    "SD3 medium in one file with its text encoders (stabilityai/stable-diffusion-3-medium on Hugging Face, once you "
    "accepted its licence there)",
    pcm_lora("sd3/pcm_deterministic_4step_shift3.safetensors"),
    _published(4, "SD3 medium", "sd3", 104),
    1024,
    "EmptySD3LatentImage",
)


DEMO = Files(
    "the demo",
    File(CHECKPOINT, "checkpoints"),
    "the demo base",
    File(LORA.name, "loras"),
    "a 4-step PCM LoRA that this pack's trainer made for it",
    128,
    "EmptySD3LatentImage",
    "PCMDemoPrompt",
    4,
)


def load_lora(model: Out, file: File, lines: int = 3) -> Node:
    """Load PCM LoRA, with room for so many lines that it says."""
    return Node("PCMLoadLora", 372 + 16 * lines, model=model, lora=file.name).of(*file.entries)


def model_column(*nodes: Node, title: str = "Model", width: int = MODEL_WIDTH) -> Column:
    """The first column, wide enough for the names of files and for the note above it."""
    return Column(Group(title, *nodes), width=width)


def load_image(name: str = "example.png") -> Node:
    return Node("LoadImage", 330, image=name)


def scaled(image: Node, width: int, height: int, crop: str = "disabled") -> Node:
    """The picture in this size; a height of 0 keeps its shape."""
    return Node("ImageScale", 170, image=image[0], upscale_method="lanczos", width=width, height=height, crop=crop)


def sample(lora: Node, positive: Node, negative: Node, latent: Node, title: str = "", **own: Any) -> Node:
    """Sample PCM, with room for what it says."""
    links = {"positive": positive[0], "negative": negative[0], "latent_image": latent[0]}
    return Node("PCMSample", 560, title, **{"model": lora[0], "recipe": lora[1], "seed": 42} | links | own)


def decode(samples: Node, vae: Out) -> Node:
    return Node("VAEDecode", 50, samples=samples[0], vae=vae)


def save(images: Out, height: int) -> Node:
    return Node("SaveImage", height, images=images, filename_prefix="pcm")


def enlarged(images: Out, times: int) -> tuple[Node, ...]:
    """The node that makes small pictures so many times as large, for the eye; none for once."""
    if times == 1:
        return ()
    return (Node("ImageScaleBy", 90, image=images, upscale_method="nearest-exact", scale_by=float(times)),)


def saved(images: Out, height: int, times: int = 1) -> tuple[Node, ...]:
    """The node that saves the pictures, and before it the one that enlarges them."""
    larger = enlarged(images, times)
    return *larger, save(larger[-1][0] if larger else images, height)


def finished(samples: Node, vae: Out, *before: Node, times: int = 1) -> Column:
    """The picture, decoded and saved. before: nodes above, such as the VAE's."""
    decoded = decode(samples, vae)
    return Column(Group("Result", *before, decoded, *saved(decoded[0], 540, times)), width=460)
