"""LoRAs for the small transformers of `helper_dits`, named and written as their authors' files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from host.server import Graph, Server, out

RANK = 4
W, Z = 64, 256  # widths of the networks, Z of that of Z-Image
# kind of `helper_dits.KINDS` -> (a prefix and the two halves' suffixes, module -> (out, in)) as its files have them
NAMES = {
    "flux": (
        ("transformer.", ".lora_A.weight", ".lora_B.weight"),
        {
            **{f"transformer_blocks.0.attn.{part}": (W, W) for part in ("to_q", "to_k", "add_v_proj", "to_out.0")},
            **{"transformer_blocks.1.ff.net.0.proj": (4 * W, W), "single_transformer_blocks.0.proj_mlp": (4 * W, W)},
            **{"single_transformer_blocks.1.attn.to_v": (W, W), "single_transformer_blocks.1.proj_out": (W, 5 * W)},
        },
    ),
    "flux2": (
        ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
        {"double_blocks.0.img_attn.qkv": (3 * W, W), "single_blocks.1.linear2": (W, 4 * W)},
    ),
    "qwen": (
        ("", ".lora_down.weight", ".lora_up.weight"),
        {
            **{
                f"transformer_blocks.0.attn.{part}": (W, W) for part in ("to_q", "add_k_proj", "to_out.0", "to_add_out")
            },
            **{"transformer_blocks.1.img_mlp.net.0.proj": (4 * W, W), "transformer_blocks.1.txt_mlp.net.2": (W, 4 * W)},
            **{"transformer_blocks.1.img_mod.1": (6 * W, W)},
        },
    ),
    "zimage": (
        ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
        {
            **{f"layers.0.attention.{part}": (Z, Z) for part in ("to_q", "to_k", "to_v", "to_out.0")},
            **{"layers.1.feed_forward.w2": (Z, 3 * Z)},
        },
    ),
    "wan": (
        ("diffusion_model.", ".lora_down.weight", ".lora_up.weight"),
        {
            **{f"blocks.0.self_attn.{part}": (W, W) for part in "qkvo"},
            **{"blocks.1.cross_attn.k": (W, W), "blocks.1.ffn.0": (2 * W, W), "blocks.1.ffn.2": (W, 2 * W)},
        },
    ),
    "ltxav": (
        ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
        {
            **{f"transformer_blocks.0.attn1.to_{part}": (W, W) for part in "qkv"},
            **{"transformer_blocks.1.audio_attn1.to_q": (W // 2, W // 2), "transformer_blocks.1.ff.net.2": (W, 4 * W)},
        },
    ),
}
NAMES["wan_i2v"] = NAMES["wan_causal"] = NAMES["wan"]
NAMES["ltxv"] = (NAMES["ltxav"][0], {f"transformer_blocks.0.attn1.to_{part}": (W, W) for part in "qkv"})
NAMES["anima"] = NAMES["cosmos"] = (
    ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
    {
        **{f"blocks.0.self_attn.{part}_proj": (W, W) for part in "qkv"},
        **{"blocks.1.cross_attn.k_proj": (W, 32), "blocks.1.mlp.layer1": (4 * W, W)},
    },
)
FILES = {
    "Hyper-FLUX.1-dev-8steps-lora": "flux",
    "FLUX.1-Turbo-Alpha": "flux",
    "flux.2-turbo-lora": "flux2",
    "Qwen-Image-Lightning-4steps-V1.0": "qwen",
    "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16": "qwen",
    "Z-Image-Fun-Lora-Distill-8-Steps-2602-ComfyUI": "zimage",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise": "wan",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise": "wan",
    "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise": "wan_i2v",
    "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise": "wan_i2v",
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32": "wan",
    "ltx-2-19b-distilled-lora-384": "ltxav",
    "anima-turbo-lora-v0.2": "anima",
    "cosmos_of_tomorrow": "cosmos",
    "ltxv_of_tomorrow": "ltxv",
    "something_of_tomorrow": "wan",
    "a_style": "qwen",
}
HEADERS = {"a_style": {"modelspec.architecture": "Qwen-Image/lora"}}
TEXT_WIDTH = 32
LATENTS = {
    "flux": ("EmptySD3LatentImage", {"width": 128, "height": 96}),
    "schnell": ("EmptySD3LatentImage", {"width": 128, "height": 96}),
    "flux2": ("EmptyFlux2LatentImage", {"width": 128, "height": 96}),
    "qwen": ("EmptySD3LatentImage", {"width": 128, "height": 96}),
    "zimage": ("EmptySD3LatentImage", {"width": 128, "height": 96}),
    "wan": ("EmptyHunyuanLatentVideo", {"width": 128, "height": 96, "length": 9}),
    "wan_i2v": ("EmptyHunyuanLatentVideo", {"width": 128, "height": 96, "length": 9}),
    "wan_causal": ("EmptyHunyuanLatentVideo", {"width": 128, "height": 96, "length": 9}),
    "ltxv": ("EmptyLTXVLatentVideo", {"width": 128, "height": 96, "length": 9}),
    "ltxav": ("EmptyLTXVLatentVideo", {"width": 128, "height": 96, "length": 9}),
    "cosmos": ("EmptyHunyuanLatentVideo", {"width": 128, "height": 96, "length": 9}),
    "anima": ("EmptySD3LatentImage", {"width": 128, "height": 96}),
    "krea2": ("EmptySD3LatentImage", {"width": 128, "height": 96}),
    "svd": ("EmptyLatentImage", {"width": 128, "height": 96}),
}


def lora(kind: str, seed: int) -> dict[str, Tensor]:
    """A random LoRA under the names of a kind; Wan's has a bias and a norm's weight besides, as lightx2v's files do."""
    (prefix, down, up), modules = NAMES[kind]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in modules.items():
        tensors[f"{prefix}{name}{down}"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[f"{prefix}{name}{up}"] = torch.randn(rows, RANK, generator=generator) / RANK**0.5
        if "down" in down:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
    if kind.startswith("wan"):
        tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.randn(W, generator=generator) / 10
        tensors["diffusion_model.blocks.1.cross_attn.norm_k.diff"] = torch.randn(W, generator=generator) / 10
    return tensors


def write_dit_loras(folder: Path) -> None:
    """Write the files of `FILES`."""
    for seed, (name, kind) in enumerate(FILES.items()):
        save_file(lora(kind, seed), folder / f"{name}.safetensors", HEADERS.get(name))


def transformer(
    kind: str, file: str | None = None, unet_name: str = "", **widgets: Any
) -> tuple[Graph, dict[str, list]]:
    """A graph with a transformer, and its links by name: base, model and recipe of the loader, prompts, latent."""
    graph = Graph()
    links = {"base": out(graph.add("TestTransformer", architecture=kind, seed=0, unet_name=unet_name))}
    if file:
        links |= loaded_on(graph, links["base"], file, **widgets)
    for number, prompt in enumerate(("positive", "negative"), 1):
        encoded = graph.add("TestConditioning", seed=number, width=TEXT_WIDTH, pooled=24, masked=kind == "ltxv")
        links[prompt] = out(encoded)
    node, size = LATENTS[kind]
    links["latent"] = out(graph.add(node, batch_size=1, **size))
    return graph, links


def skip_without(server: Server, kind: str) -> None:
    """Skip the test where the host is older than this kind of transformer."""
    node = server.get("/object_info/TestTransformer")["TestTransformer"]
    if kind not in node["input"]["required"]["architecture"][0]:
        pytest.skip(f"this host has no {kind}")


def skip_where_lcm_repeats_its_noise(server: Server) -> None:
    """Skip the test where the host's lcm draws fresh noise at the seed of the first, which is then the same."""
    sampling = server.folder / "comfy" / "k_diffusion" / "sampling.py"
    if "seed += 1" not in sampling.read_text(encoding="utf-8"):
        pytest.skip("this host's lcm does not add 1 to the seed")


def loaded_on(graph: Graph, model: list, file: str, **widgets: Any) -> dict[str, list]:
    """Load PCM LoRA on a model, and the links that come out of it."""
    settings = {"strength": 1.0, "recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0} | widgets
    loader = graph.add("PCMLoadLora", model=model, lora=f"{file}.safetensors", **settings)
    return {"model": out(loader), "recipe": out(loader, 1)}


def core_lora(graph: Graph, model: list, file: str, strength: float = 1.0) -> list:
    """Core's loader of the same file on a model."""
    name = f"{file}.safetensors"
    return out(graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength))
