"""A DoRA as the trainer writes it, in a real host: core's loader and ours make of it what PEFT makes of the weights."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn

from host import tiny_sd3
from host.graphs import loaded, sample
from host.reference import conditioning, ddim, flow_euler
from host.server import out
from host.tiny import RECIPE, make_unet
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.lora.write import dora_tensors
from phased_consistency.trainer.tiny.single_file import LATENT_SCALE, LATENT_SHIFT

VAE_SCALE = 0.18215  # by which the host divides SD1.5's latents


@torch.no_grad()
def adapted(network: nn.Module, family) -> Adapter:
    """A DoRA of rank 4 on everything that the trainer adapts, with random weights and lengths."""
    adapter = Adapter(network.requires_grad_(False), family.lora_targets, 4, 2.0, seed=0, dora=True)
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapter.named_parameters().items():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(weight * (1 + 0.1 * noise) if name.endswith("vector") else weight + 0.05 * noise)
    return adapter


def write(models, adapter: Adapter, family, recipe) -> tuple[str, int]:
    """The adapter's file in the host's folder, and one with PEFT's magnitudes alone; returns the first one's name, and
    how many modules it has."""
    base = SimpleNamespace(network=adapter.network, dora_names=family.dora_names)
    base.host_rows = partial(family.host_rows, base)
    tensors = dora_tensors(adapter.state(), 4, 2.0, base, torch.float32)
    name = f"dora_{family.name}.safetensors"
    header = {HEADER_KEY: recipe.to_header()}
    save_file(tensors, models.folder / "loras" / name, header)
    by_peft = {key: tensor for key, tensor in tensors.items() if not key.endswith("dora_scale")}
    save_file(by_peft, models.folder / "loras" / f"peft_{name}", header)
    return name, len(adapter.layers)


def drawn(server, graph, links, name: str) -> tuple[torch.Tensor, str]:
    """The latent by Load PCM LoRA, which core's loader gives to the bit, and what the node says.

    Of PEFT's magnitudes alone the node makes the same; core drops them.
    """
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name=name, strength_model=1.0)
    widgets = {"strength": 1.0, "recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0}
    peft = graph.add("PCMLoadLora", model=links["base"], lora=f"peft_{name}", **widgets)
    models = (links["model"], out(core), out(peft), links["base"])
    run, latents = server.latents(graph, *(sample(graph, links | {"model": model}) for model in models))
    ours, cores, pefts, bare = latents
    assert torch.equal(ours, cores) and (ours - bare).abs().max() > 0.05
    assert (ours - pefts).abs().max() < 1e-4 * ours.abs().max()
    assert run.text(peft) == run.text(links["model"][0])
    return ours, run.text(links["model"][0])


def test_sd15_is_drawn_as_by_peft(server, models):
    adapter = adapted(make_unet(), SD15)
    name, modules = write(models, adapter, SD15, RECIPE)
    latent, said = drawn(server, *loaded(name), name)
    assert f"{modules} of {modules} modules matched" in said and f"Other than plain LoRA: {modules} DoRA." in said
    with torch.no_grad():
        x = ddim(adapter.network, conditioning(768)[0])
    assert (VAE_SCALE * latent - x).abs().max() < 1e-4 * x.abs().max()


def test_sd3_is_drawn_as_by_peft(server, models):
    adapter = adapted(tiny_sd3.make_transformer(), SD3)
    name, modules = write(models, adapter, SD3, tiny_sd3.RECIPE)
    graph, links = loaded(name, checkpoint="sd3.safetensors", text_width=4096)
    links["latent"] = out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    latent, said = drawn(server, graph, links, name)
    assert f"{modules} of {modules} modules matched" in said
    with torch.no_grad():
        x = flow_euler(adapter.network, *conditioning(4096), [1.0, 0.9, 0.75, 0.5])
    assert ((latent - LATENT_SHIFT) * LATENT_SCALE - x).abs().max() < 1e-4 * x.abs().max()
