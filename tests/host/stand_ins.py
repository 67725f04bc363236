"""The tests' small files under the names that the templates have, and what else makes each template run in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
# The stand-ins have no text encoders; what takes their place is this wide.
TEXT_WIDTHS = {
    "v1-5-pruned-emaonly-fp16": {"width": 768, "pooled": 768},
    "sd_xl_base_1.0": {"width": 2048, "pooled": 1280},
    "sd3_medium_incl_clips_t5xxlfp8": {"width": 4096, "pooled": 2048},
}
SMALL = {  # so that they take seconds
    "EmptyLatentImage": {"width": 64, "height": 64},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
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


def make_small(graph: dict[str, Any]) -> None:
    """Give a graph small sizes, and random text conditioning for its prompts: the stand-ins have no text encoders."""
    checkpoint = next(node["inputs"]["ckpt_name"] for node in graph.values() if "ckpt_name" in node["inputs"])
    for i, node in graph.items():
        if node["class_type"] == "CLIPTextEncode":
            widths = TEXT_WIDTHS[checkpoint.removesuffix(".safetensors")]
            node |= {"class_type": "TestConditioning", "inputs": {"seed": int(i), **widths}}
        node["inputs"] |= SMALL.get(node["class_type"], {})
