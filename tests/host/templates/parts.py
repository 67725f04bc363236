"""What several templates have: the files that people have, the nodes that load them, and what the notes say of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from host.workflows import Column, Node, Out

PASSES = "4 passes of the network, where 25 steps with CFG take 50."
AS_RECOMMENDED = "steps 0 and CFG 0 mean as the LoRA recommends"
GIRL = "a girl with long yellow hair in a pink dress on a green hill, blue sky"
FOX = "a red fox asleep in fresh snow, morning light, photograph"


@dataclass(frozen=True)
class Files:
    """A checkpoint and a few-step LoRA for it, as a template names them.

    family: as people write it. of, lora_of: what the note says of where they come from, and of others that will do.
    side: of the pictures that the checkpoint was made for, in pixels.
    """

    family: str
    checkpoint: str
    of: str
    lora: str
    lora_of: str
    side: int = 512
    empty: str = "EmptyLatentImage"

    @property
    def note(self) -> str:
        """What the note says of them, as a list that others may be added to."""
        return (
            f"**Files**\n- models/checkpoints: {self.of}, here {self.checkpoint}\n"
            f"- models/loras: {self.lora_of}, here {self.lora}"
        )

    def model(self, height: int = 320) -> tuple[Node, Node]:
        """The checkpoint and its LoRA."""
        base = Node("CheckpointLoaderSimple", 100, ckpt_name=self.checkpoint)
        return base, Node("PCMLoadLora", height, model=base[0], lora=self.lora)

    def empty_latent(self, batch: int = 1) -> Node:
        return Node(self.empty, 110, width=self.side, height=self.side, batch_size=batch)


def _published(steps: int, family: str, folder: str, size: int) -> str:
    return (
        f"{'an' if steps == 8 else 'a'} {steps}-step PCM LoRA for {family} ({size} MB, in the folder {folder} of "
        "wangfuyun/PCM_Weights on Hugging Face), or one you made with this pack's trainer"
    )


ANY_SD15 = "any SD1.5 checkpoint (Comfy-Org/stable-diffusion-v1-5-archive on Hugging Face has the first one)"
SD15 = Files(
    "SD1.5",
    "v1-5-pruned-emaonly-fp16.safetensors",
    ANY_SD15,
    "pcm_sd15_smallcfg_4step_converted.safetensors",
    _published(4, "SD1.5", "sd15", 135),
)
SD15_NORMAL = Files(
    "SD1.5",
    "v1-5-pruned-emaonly-fp16.safetensors",
    ANY_SD15,
    "pcm_sd15_normalcfg_8step_converted.safetensors",
    _published(8, "SD1.5 that works with CFG", "sd15", 135),
)
SDXL = Files(
    "SDXL",
    "sd_xl_base_1.0.safetensors",
    "any SDXL checkpoint (stabilityai/stable-diffusion-xl-base-1.0 on Hugging Face has the first one)",
    "pcm_sdxl_smallcfg_4step_converted.safetensors",
    _published(4, "SDXL", "sdxl", 394),
    1024,
)
SD3 = Files(
    "SD3",
    "sd3_medium_incl_clips_t5xxlfp8.safetensors",
    "SD3 medium in one file with its text encoders (stabilityai/stable-diffusion-3-medium on Hugging Face, once you "
    "accepted its licence there)",
    "pcm_deterministic_4step_shift3.safetensors",
    _published(4, "SD3 medium", "sd3", 104),
    1024,
    "EmptySD3LatentImage",
)


DEMO = Files(
    "the demo",
    "pcm_demo_emoji.safetensors",
    "the demo base",
    "pcm_demo_emoji_4step.safetensors",
    "a 4-step PCM LoRA that this pack's trainer made for it",
    128,
    "EmptySD3LatentImage",
)


def prompts(base: Node, positive: str, height: int = 140, negative: str = "") -> tuple[Node, Node]:
    unused = "" if negative else " (unused at CFG 1)"
    return (
        Node("CLIPTextEncode", height, "Positive prompt", clip=base[1], text=positive),
        Node("CLIPTextEncode", 100, f"Negative prompt{unused}", clip=base[1], text=negative),
    )


def load_image(title: str = "", height: int = 340) -> Node:
    return Node("LoadImage", height, title, image="example.png")


def sample(lora: Node, positive: Node, negative: Node, latent: Node, title: str = "", **own: Any) -> Node:
    """Sample PCM, with room for what it says."""
    links = {"positive": positive[0], "negative": negative[0], "latent_image": latent[0]}
    return Node("PCMSample", 520, title, **{"model": lora[0], "recipe": lora[1], "seed": 42} | links | own)


def decode(samples: Node, base: Node) -> Node:
    return Node("VAEDecode", 50, samples=samples[0], vae=base[2])


def save(images: Out, height: int = 760) -> Node:
    return Node("SaveImage", height, images=images, filename_prefix="pcm")


def finished(samples: Node, base: Node, height: int = 410) -> Column:
    """The picture, decoded and saved. height: of the node that shows it."""
    decoded = decode(samples, base)
    return Column("Result", decoded, save(decoded[0], height), width=400, gap=60)
