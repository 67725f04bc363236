"""What transformers draw as pictures: edits keep what they keep of any family, and a comparison shows clips."""

from __future__ import annotations

import pytest
import torch

from host.dits import skip_without, transformer
from host.graphs import edit, picture, sample
from host.server import out
from host.test_compare import compare
from host.test_editing import drawn, keeps_the_rest, nchw
from host.test_families import QWEN, TURBO, ZIMAGE, two_experts
from phased_consistency.samplers.operators import luminance


@pytest.mark.parametrize(("kind", "file"), [("flux", TURBO), ("zimage", ZIMAGE), ("qwen", QWEN)])
def test_edits_keep_what_they_keep(server, kind, file):
    """Qwen-Image's latents are of clips, with one frame each."""
    skip_without(server, "flux2" if kind == "qwen" else kind)  # an older host's VAE for clips has one size alone
    graph, links = transformer(kind, file)
    if kind == "qwen":
        links["vae"] = out(graph.add("TestClipAutoencoder", seed=0))
    else:
        links["vae"] = out(graph.add("CheckpointLoaderSimple", ckpt_name="sd3.safetensors"), 2)
    image_inputs = picture(graph, batch=2)
    nodes = [edit(graph, links, "Inpaint", **image_inputs), edit(graph, links, "Colorize", image=image_inputs["image"])]
    _, (inpainted, colorized) = server.tensors(graph, *map(out, nodes))
    before, mask = drawn(batch=2)
    assert keeps_the_rest(before, nchw(inpainted), mask)
    assert (luminance(nchw(colorized)) - luminance(before)).abs().max() < 1e-5


def test_a_comparison_of_clips_by_two_experts(server):
    """Three frames of each in the grid, all of them in the batch."""
    skip_without(server, "flux2")
    graph, links = two_experts()
    links["vae"] = out(graph.add("TestClipAutoencoder", seed=0))
    second = {"low_noise_model": links["low_noise_model"]}
    node = compare(graph, links, step_counts="4, 3", **second)
    singles = [sample(graph, links, steps=steps, **second) for steps in (4, 3)]
    clips = [out(graph.add("VAEDecode", samples=out(single), vae=links["vae"])) for single in singles]
    run, (grid, images, *frames) = server.tensors(graph, out(node), out(node, 1), *clips)
    assert torch.equal(images, torch.cat(frames)) and images.shape == (18, 96, 128, 3)
    assert [line for line in run.text(node).splitlines() if "evaluation" in line] == [
        "4 steps, deterministic, CFG 1: 4 evaluations.",
        "3 steps, deterministic, CFG 1: 3 evaluations.",
    ]
    assert 3 * 128 < grid.shape[2] < 9 * 128
