"""The tests' small files under the names that the templates have, and what else makes each template run in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from host.dits import skip_without
from host.server import Server

STAND_INS = {
    "checkpoints": {
        "v1-5-pruned-emaonly-fp16": "tiny",
        "sd_xl_base_1.0": "sdxl",
        "sd3_medium_incl_clips_t5xxlfp8": "sd3",
    },
    "loras": {  # by files without a header, as the published ones are
        "pcm_sd15_smallcfg_4step_converted": "unnamed",
        "pcm_sd15_normalcfg_8step_converted": "unnamed",
        "pcm_sdxl_smallcfg_4step_converted": "sdxl_lightning_4step_lora",
        "pcm_deterministic_4step_shift3": "Hyper-SD3-4steps-CFG-lora",
    },
    "controlnet": {"control_v11p_sd15_canny_fp16": "tiny"},
}
# Files of transformers, which are never read: `make_small` puts a small one in their place, of this kind.
NETWORKS = {
    "flux1-dev": "flux",
    "qwen_image_fp8_e4m3fn": "qwen",
    "z_image_turbo_bf16": "zimage",
    "wan2.2_t2v_high_noise_14B_fp8_scaled": "wan",
    "wan2.2_t2v_low_noise_14B_fp8_scaled": "wan",
}
UNREAD = {
    "diffusion_models": tuple(NETWORKS),
    "text_encoders": (
        *("clip_l", "t5xxl_fp8_e4m3fn_scaled", "qwen_2.5_vl_7b_fp8_scaled", "qwen_3_4b"),
        "umt5_xxl_fp8_e4m3fn_scaled",
    ),
    "vae": ("ae", "qwen_image_vae", "wan_2.1_vae"),
}
PLAIN_VAE = "ae.safetensors"  # the others' latents have frames
# The stand-ins have no text encoders; what takes their place is this wide.
TEXT_WIDTHS = {
    "v1-5-pruned-emaonly-fp16": {"width": 768, "pooled": 768},
    "sd_xl_base_1.0": {"width": 2048, "pooled": 1280},
    "sd3_medium_incl_clips_t5xxlfp8": {"width": 4096, "pooled": 2048},
}
DIT_WIDTHS = {"width": 32, "pooled": 24}  # of the text of the small transformers
SMALL = {  # so that they take seconds
    "EmptyLatentImage": {"width": 64, "height": 64},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "EmptyHunyuanLatentVideo": {"width": 64, "height": 64, "length": 5},
    "ImageScale": {"width": 64},
    "KSampler": {"steps": 2},
    "PCMOutpaint": {"left": 16, "right": 16},
    "PCMInterpolate": {"frames": 2},
}


def add_stand_ins(models: Path) -> None:
    """Link the names to the files in a host's models folder (`make_checkpoint` and its like)."""
    for kind, names in STAND_INS.items():
        for name, file in names.items():
            (models / kind / f"{name}.safetensors").symlink_to(f"{file}.safetensors")
    for kind, names in UNREAD.items():
        (models / kind).mkdir(exist_ok=True)
        for name in names:
            (models / kind / f"{name}.safetensors").symlink_to(models / "loras" / "unnamed.safetensors")


def skip_without_small(server: Server, graph: dict[str, Any]) -> None:
    """Skip the test where the host is older than what takes the place of this graph's networks."""
    inputs = [node["inputs"] for node in graph.values()]
    for name in [node["unet_name"] for node in inputs if "unet_name" in node]:
        skip_without(server, NETWORKS[name.removesuffix(".safetensors")])
    if any(node.get("vae_name", PLAIN_VAE) != PLAIN_VAE for node in inputs):
        skip_without(server, "flux2")  # an older host's VAE for clips has one size alone


def make_small(graph: dict[str, Any]) -> None:
    """Give a graph small sizes, small transformers, and random text conditioning for its prompts: the stand-ins have no
    text encoders."""
    checkpoints = [node["inputs"]["ckpt_name"] for node in graph.values() if "ckpt_name" in node["inputs"]]
    for i, node in graph.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CLIPTextEncode":
            widths = TEXT_WIDTHS[checkpoints[0].removesuffix(".safetensors")] if checkpoints else DIT_WIDTHS
            node |= {"class_type": "TestConditioning", "inputs": {"seed": int(i), **widths}}
        elif kind == "UNETLoader":
            name = inputs["unet_name"]
            small = {"architecture": NETWORKS[name.removesuffix(".safetensors")], "seed": int(i), "unet_name": name}
            node |= {"class_type": "TestTransformer", "inputs": small}
        elif kind == "VAELoader":
            plain = {"class_type": "TestAutoencoder", "inputs": {"ckpt_name": "sd3.safetensors"}}
            with_frames = {"class_type": "TestClipAutoencoder", "inputs": {"seed": 0}}
            node |= plain if inputs["vae_name"] == PLAIN_VAE else with_frames
        node["inputs"] |= SMALL.get(kind, {})
