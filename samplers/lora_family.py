"""Which family a LoRA file is for, by its tensors' names and widths, else by its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from .lora_modules import LoraModule
from .recipe import HEADER_KEY, Recipe

# Entries in which trainers say what they trained on, and how those begin without their punctuation.
BASE_ENTRIES = ("modelspec.architecture", "ss_base_model_version")
BASE_MARKS = (
    ("sd15", r"(?:stablediffusion|sd)v?1"),
    ("sd2", r"(?:stablediffusion|sd)v?2"),
    ("sdxl", r"(?:stablediffusion|sd)xl"),
    ("sd3", r"(?:stablediffusion|sd)v?3"),
    ("flux2", r"flux2"),
    ("flux", r"flux(?:1|$)"),
    ("chroma", r"chroma"),
    ("qwen_image", r"qwenimage"),
    ("lumina2", r"zimage"),
    ("wan2.1", r"wan2"),
    ("ltxav", r"ltx2"),
    ("hunyuan_video", r"hunyuanvideo"),
    ("anima", r"anima(?!gine)"),
)
CONTEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
# SVD is SD2's UNet with layers over the frames between: in the names of its authors and of diffusers
OVER_FRAMES = re.compile(r"_attentions_\d+_temporal_transformer_blocks_\d|_\d+_time_stack_\d")
UNET_CONTEXT = re.compile(r"_(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_.*attn2_to_k$")


class Mark(NamedTuple):
    """Modules that networks of one family alone have.

    family: as in `families`. names: a regular expression for kohya's names of the modules. widths: of what goes in;
    none: any will do. ratio: the width of what comes out over that of what goes in; None: any will do.
    """

    family: str
    names: str
    widths: tuple[int, ...] = ()
    ratio: int | None = None

    def matches(self, name: str, module: LoraModule) -> bool:
        """Whether a module, by its kohya name, is one of these. A kind of LoRA that does not show its widths is none
        where widths are asked for."""
        down, up = module.shapes.get("down", ()), module.shapes.get("up", ())
        width = down[1] if len(down) >= 2 else None
        suits = not self.widths or width in self.widths
        grows = self.ratio is None or bool(width and up and up[0] == self.ratio * width)
        return suits and grows and re.search(self.names, name) is not None


# In the names of the authors' own networks, which ComfyUI keeps, and in those of diffusers. What a family shares with
# another is no mark: attention alone may be of FLUX.1 or of Chroma, and then only the metadata can tell.
MARKS = (
    Mark(
        "sd3",
        r"(?<!single_)transformer_blocks_\d+_(attn_to_k|attn_add_k_proj|norm1_context_linear)$"
        r"|joint_blocks_\d+_(x|context)_block_(attn2?_qkv|attn2?_proj|mlp_fc1|adaLN_modulation_1)$",
        (1536, 2432),
    ),
    Mark("chroma", r"_distilled_guidance_layer_"),
    Mark("flux2", r"_(double|single)_stream_modulation_(img_|txt_)?lin|_transformer_blocks_\d+_ff_context_linear_in$"),
    Mark("flux2", r"_single_transformer_blocks_\d+_attn_to_qkv_mlp_proj$"),
    Mark("flux2", r"_unet_single_blocks_\d+_linear1$", ratio=9),
    Mark("flux2", r"_unet_double_blocks_\d+_(img|txt)_mlp_0$", ratio=6),
    Mark("flux", r"_unet_(double_blocks_\d+_(img|txt)_mod|single_blocks_\d+_modulation)_lin$", (3072,)),
    Mark("flux", r"_single_transformer_blocks_\d+_norm_linear$", (3072,)),
    Mark("hunyuan_video", r"_unet_double_blocks_\d+_(img|txt)_(mod_linear|mlp_fc1)$", (3072,)),
    Mark("hunyuan_video", r"_unet_single_blocks_\d+_modulation_linear$|_txt_in_individual_token_refiner_", (3072,)),
    Mark("qwen_image", r"_transformer_transformer_blocks_\d+_txt_(mod_1|mlp_net_0_proj)$", (3072,)),
    # of attention alone the number of blocks tells: FLUX.1 has 19
    Mark("qwen_image", r"_transformer_transformer_blocks_(2[4-9]|[3-5]\d)_attn_add_q_proj$", (3072,)),
    Mark("lumina2", r"_unet_(layers|noise_refiner|context_refiner)_\d+_attention_(qkv|to_q|out|to_out_0)$", (3840,)),
    Mark("lumina2", r"_unet_(layers|noise_refiner|context_refiner)_\d+_feed_forward_w1$", (3840,)),
    Mark("wan2.1", r"_unet_blocks_\d+_(self|cross)_attn_[qkvo]$", (1536, 3072, 5120)),
    Mark("ltxav", r"_transformer_transformer_blocks_\d+_(audio_(attn|ff|to_video)|video_to_audio_attn)"),
    Mark("ltxv", r"_transformer_transformer_blocks_\d+_attn1_to_q$", (2048,)),
    Mark("hidream", r"_unet_(double|single)_stream_blocks_\d+_block_attn", (2560,)),
    Mark("krea2", r"_unet_(text_fusion|txtfusion)_|_transformer_transformer_blocks_\d+_attn_to_gate$", (2560, 6144)),
    Mark("krea2", r"_unet_blocks_\d+_attn_(w[qkvo]|gate)$", (6144,)),
    Mark("anima", r"_unet_llm_adapter_"),
)


def family_by_tensors(modules: Mapping[str, LoraModule]) -> str | None:
    """The family of a LoRA's network by its modules, under kohya's names; None where they do not tell."""
    if any(OVER_FRAMES.search(name) for name in modules):
        return "svd_img2vid"
    for name, module in modules.items():
        down = module.shapes.get("down", ())
        if UNET_CONTEXT.search(name) and len(down) >= 2 and down[1] in CONTEXT_WIDTHS:
            return CONTEXT_WIDTHS[down[1]]
    marked = (mark.family for mark in MARKS for name, module in modules.items() if mark.matches(name, module))
    return next(marked, None)


def family_from_metadata(metadata: Mapping[str, str]) -> str | None:
    """Family by `pcm.recipe`, else by the first of `BASE_ENTRIES` that tells; None when none does."""
    if HEADER_KEY in metadata:
        return Recipe.from_header(metadata[HEADER_KEY]).family
    bases = [re.sub(r"[^a-z0-9]", "", metadata.get(entry, "").lower()) for entry in BASE_ENTRIES]
    families = (family for base in bases for family, mark in BASE_MARKS if re.match(mark, base))
    return next(families, None)
