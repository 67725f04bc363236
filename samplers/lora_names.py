"""Names of a LoRA file's tensors: of which module each is, and which part of it, in every published key style.

Every style is brought to one name per module, kohya's (lora_unet_*; for SD3 lora_transformer_*). ComfyUI maps those
whole; of the PEFT and diffusers styles it drops all attention projections for SD1.5 and SDXL.
"""

from __future__ import annotations

import re

# part of a module -> the suffixes of its tensors' names, as regular expressions. A name in PEFT's style may hold the
# adapter's own name before its end, `lora_A.default_0.weight`.
_PEFT = r"(?:\.[^.]+)?"
_SUFFIXES = {
    "down": rf"\.lora_down\.weight|\.lora_A{_PEFT}\.weight|\.lora_A|\.lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight|_lora\.down\.weight",
    "up": rf"\.lora_up\.weight|\.lora_B{_PEFT}\.weight|\.lora_B|\.lora\.up\.weight"
    r"|\.lora_linear_layer\.up\.weight|_lora\.up\.weight",
    "bias": rf"\.lora_B{_PEFT}\.bias|\.lora_up\.bias",
    "mid": r"\.lora_mid\.weight",
    "dora_scale": r"\.dora_scale",
    "magnitude": rf"\.lora_magnitude_vector{_PEFT}\.weight|\.lora_magnitude_vector{_PEFT}",
}
# parts whose names every style shares: those of LyCORIS' algorithms, and of whole weights and biases
_SHARED = (
    "alpha",
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    *("oft_blocks", "rescale", "on_input"),
    *("diff", "diff_b", "set_weight", "w_norm", "b_norm"),
)
_SUFFIXES |= {part.replace(".", "_"): rf"\.{re.escape(part)}" for part in _SHARED}
_SUFFIX = re.compile("(?:" + "|".join(f"(?P<{part}>{suffix})" for part, suffix in _SUFFIXES.items()) + r")\Z")

# Where the name of a part is not its suffix in the names that ComfyUI maps; a PEFT bias is scaled on the way.
_HOST_SUFFIXES = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    "bias": "diff_b",
} | {part.replace(".", "_"): part for part in _SHARED}

KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
# prefixes of text encoders, the longer ones first -> kohya's: diffusers', then those that ComfyUI saves
TEXT_ENCODERS = (
    ("text_encoder_3.", "lora_te3_"),
    ("text_encoder_2.", "lora_te2_"),
    ("text_encoder.", "lora_te_"),
    ("text_encoders.clip_l.transformer.", "lora_te1_"),
    ("text_encoders.clip_g.transformer.", "lora_te2_"),
    ("text_encoders.t5xxl.transformer.", "lora_te3_"),
)
WRAPPERS = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
SD3_ROOTS = ("transformer_blocks", "context_embedder", "pos_embed", "time_text_embed", "norm_out", "proj_out")


def split_key(name: str) -> tuple[str, str] | None:
    """Tensor name -> (kohya module name, part), for every published key style; None for other tensors.

    unet.mid_block.attentions.0.proj_in.lora_A.weight -> (lora_unet_mid_block_attentions_0_proj_in, down).
    """
    suffix = _SUFFIX.search(name)
    return (module_name(name[: suffix.start()]), suffix.lastgroup) if suffix and suffix.start() else None


def path_of(name: str, part: str) -> str:
    """The module's path in a tensor's name as it is: `unet.mid_block.attentions.0.proj_in`.

    part: of the module, as by `split_key`, or another suffix that the name ends in after a dot.
    """
    suffix = _SUFFIX.search(name)
    return name[: suffix.start()] if suffix else name.removesuffix(f".{part}")


def module_name(path: str) -> str:
    """kohya's name of a module, from its path in any published style."""
    if path.startswith(KOHYA_PREFIXES):
        return path.replace(".", "_")  # some scripts keep the dots of the module's own path
    for encoder, prefix in TEXT_ENCODERS:
        if path.startswith(encoder):
            return prefix + path.removeprefix(encoder).replace(".", "_")
    path = bare_path(path).replace(".processor.", ".")
    path = re.sub(r"\.to_out$", ".to_out.0", path)
    return ("lora_transformer_" if path.startswith(SD3_ROOTS) else "lora_unet_") + path.replace(".", "_")


def is_encoders(name: str) -> bool:
    """Whether a kohya name is of a text encoder's module."""
    return name.startswith("lora_te")


def bare_path(path: str) -> str:
    """A module's path within its network, without what wrapped the network when the file was written."""
    path = path.removeprefix("lycoris_")
    while path.startswith(WRAPPERS):
        path = path.removeprefix(next(w for w in WRAPPERS if path.startswith(w)))
    return path


def host_suffix(part: str) -> str:
    """The suffix under which ComfyUI knows a part of a module: "down" -> "lora_down.weight"."""
    return _HOST_SUFFIXES.get(part, part)
