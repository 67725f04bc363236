"""Checkpoints for inpainting: a LoRA of the plain model fits them, and PCM Inpaint gives them picture and mask."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from host.graphs import composed, edit, loaded, picture, sample
from host.server import out

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
DOWN = "lora_unet_conv_in.lora_down.weight"


@pytest.fixture(scope="module", autouse=True)
def files(models) -> None:
    """The tiny checkpoint with five more inputs, and the LoRA with zeros for them, as core's loader needs it."""
    tensors = load_file(models.folder / "checkpoints" / "tiny.safetensors")
    more = 0.05 * torch.randn(320, 5, 3, 3, generator=torch.Generator().manual_seed(4))
    tensors[CONV_IN] = torch.cat([tensors[CONV_IN], more], 1)
    save_file(tensors, models.folder / "checkpoints" / "inpainting.safetensors")
    lora = load_file(models.folder / "loras" / "kohya.safetensors")
    lora[DOWN] = torch.nn.functional.pad(lora[DOWN], (0, 0, 0, 0, 0, 5))
    save_file(lora, models.folder / "loras" / "padded.safetensors")


def test_a_lora_of_the_plain_model_is_taken_whole(server, models):
    graph, links = loaded(checkpoint="inpainting.safetensors")
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="padded.safetensors", strength_model=1.0)
    nodes = [sample(graph, links | {"model": model}) for model in (links["model"], out(core))]
    run, (ours, theirs) = server.latents(graph, *nodes)
    assert torch.equal(ours, theirs)
    lines = run.text(links["model"][0]).splitlines()
    assert f"{len(models.lora)} of {len(models.lora)} modules matched." in lines[1]
    assert lines[-1] == "This model takes a picture and a mask as well, on which the LoRA has no say."


@pytest.mark.parametrize("projection", ["picture", "latent"])
def test_the_model_is_given_the_picture_and_the_mask(server, projection):
    """As by core's InpaintModelConditioning, and not as without."""
    graph, links = loaded(checkpoint="inpainting.safetensors")
    inputs = picture(graph, 64, 64)
    whole = edit(graph, links, "Inpaint", **inputs, projection=projection)
    named = {key: links[key] for key in ("positive", "negative", "vae")}
    shown = graph.add(
        "InpaintModelConditioning", **named, pixels=inputs["image"], mask=inputs["mask"], noise_mask=False
    )
    given = links | {"positive": out(shown), "negative": out(shown, 1)}
    parts = [composed(graph, each, "Inpaint", **inputs, projection=projection) for each in (given, links)]
    _, (ours, theirs, without) = server.tensors(graph, out(whole, 1), *(each["latent"] for each in parts))
    assert torch.equal(ours, theirs) and (ours - without).abs().max() > 1e-3


def test_at_sizes_that_are_no_multiple_of_8(server):
    """The picture and the mask are on the edit's own canvas, where core's node alone would cut and shift them."""
    graph, links = loaded(checkpoint="inpainting.safetensors")
    inputs = picture(graph, 70, 50)
    whole = edit(graph, links, "Inpaint", **inputs)
    operator = graph.add("PCMInpaintOperator", **inputs, grow=8)
    empty = graph.add("SolidMask", value=0.0, width=72, height=64)
    mask = graph.add("MaskComposite", destination=out(empty), source=inputs["mask"], x=0, y=0, operation="add")
    named = {key: links[key] for key in ("positive", "negative", "vae")}
    shown = graph.add("InpaintModelConditioning", **named, pixels=out(operator, 1), mask=out(mask), noise_mask=False)
    parts = composed(graph, links | {"positive": out(shown), "negative": out(shown, 1)}, "Inpaint", **inputs)
    _, (ours, theirs) = server.tensors(graph, out(whole, 1), parts["latent"])
    assert ours.shape == (1, 4, 8, 9) and torch.equal(ours, theirs)
