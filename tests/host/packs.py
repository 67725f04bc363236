"""Well-known packs that are tested beside ours, on a host of their own, where they are in the host's custom_nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from host.server import Graph, Server, out

RGTHREE, EFFICIENCY, IMPACT = "rgthree-comfy", "efficiency-nodes-comfyui", "ComfyUI-Impact-Pack"  # in custom_nodes
PACKS = {  # folder -> owner on GitHub, and a node of it
    RGTHREE: ("rgthree", "Power Lora Loader (rgthree)"),
    EFFICIENCY: ("jags111", "Efficient Loader"),
    IMPACT: ("ltdrdata", "ImpactKSamplerBasicPipe"),
}
WITH_TEXT = "tiny_text.safetensors"  # a checkpoint that has a text encoder: some loaders encode prompts themselves
UPSCALER = "none.safetensors"
OFF = "None"  # what a loader has in place of a LoRA that is not used
SLOTS = 50  # of the LoRA Stacker


def need_folder(folder: Path, pack: str) -> None:
    """Skip the test where a ComfyUI has not this pack, with a sentence that says how to get it."""
    packs = folder / "custom_nodes"
    if not (packs / pack).is_dir():
        clone = f"git clone https://github.com/{PACKS[pack][0]}/{pack}"
        pytest.skip(f"{pack} is not in {packs}: {clone} there, and install its requirements.txt")


def need_nodes(server: Server, pack: str) -> None:
    """Skip the test where a host has the pack's folder, but not its nodes, with the host's reason."""
    if PACKS[pack][1] not in server.get("/object_info"):
        pytest.skip(f"{pack} is in custom_nodes, but this host could not import it: {_why_not(server.log, pack)}")


def _why_not(log: str, pack: str) -> str:
    """What a host's log says of a pack that could not be imported."""
    words = f"{pack} module for custom nodes: "
    return next((line.partition(words)[2] for line in log.splitlines() if words in line), "its log says why")


def add_files(folder: Path) -> None:
    """Write the tiny checkpoint with two tensors of a text encoder, of which the host makes up the rest, of any values;
    and an empty file, since a node wants one chosen that it does not read."""
    prefix = "cond_stage_model.transformer.text_model.final_layer_norm"
    encoder = {f"{prefix}.weight": torch.ones(768), f"{prefix}.bias": torch.zeros(768)}
    checkpoints = folder / "checkpoints"
    save_file(load_file(checkpoints / "tiny.safetensors") | encoder, checkpoints / WITH_TEXT)
    (folder / "upscale_models").mkdir(exist_ok=True)
    (folder / "upscale_models" / UPSCALER).touch()


def power_loader(graph: Graph, model: list, **entries: dict[str, Any]) -> list:
    """The model after rgthree's Power Lora Loader. entries: lora_1 and so on."""
    return out(graph.add("Power Lora Loader (rgthree)", model=model, **entries))


def power(lora: str = "kohya.safetensors", on: bool = True, strength: float = 1.0) -> dict[str, Any]:
    """An entry of that loader, as its frontend queues it."""
    return {"on": on, "lora": lora, "strength": strength}


def lora_stack(graph: Graph, *loras: str, mode: str = "simple", count: int | None = None, **settings: Any) -> list:
    """The stack of the Efficiency nodes' LoRA Stacker, which queues all its slots, used or not."""
    inputs = {"input_mode": mode, "lora_count": len(loras) if count is None else count}
    for i, name in enumerate([*loras, *[OFF] * (SLOTS - len(loras))], 1):
        inputs |= {f"lora_name_{i}": name, f"lora_wt_{i}": 1.0, f"model_str_{i}": 1.0, f"clip_str_{i}": 1.0}
    return out(graph.add("LoRA Stacker", **inputs | settings))


def efficient_loader(graph: Graph, lora: str = OFF, strength: float = 1.0, **settings: Any) -> list:
    """The model of an Efficient Loader."""
    files = {"ckpt_name": WITH_TEXT, "vae_name": "Baked VAE", "lora_name": lora}
    texts = {"positive": "a fox", "negative": "", "token_normalization": "none", "weight_interpretation": "comfy"}
    sizes = {"empty_latent_width": 64, "empty_latent_height": 64, "batch_size": 1, "clip_skip": -1}
    strengths = {"lora_model_strength": strength, "lora_clip_strength": 1.0}
    return out(graph.add("Efficient Loader", **files | texts | sizes | strengths | settings))


def basic_pipe(graph: Graph, links: dict[str, list]) -> list:
    """Impact-Pack's model and prompts in one link."""
    parts = {name: links[name] for name in ("model", "vae", "positive", "negative")}
    return out(graph.add("ToBasicPipe", **parts, clip=[links["vae"][0], 1]))
