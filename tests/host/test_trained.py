"""A LoRA trained by us gives in ComfyUI what it gives in the trainer: same weights, prompt, noise and levels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from host.graphs import core_sampler, custom, edit, loaded, picture, sample, scheduler
from host.server import Graph, out
from host.tiny import make_unet
from host.tiny import make_vae as make_sd15_vae
from host.tiny_sd3 import make_transformer, make_vae
from host.tiny_sdxl import make_sdxl_unet
from phased_consistency.samplers.operators import Colorize
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.generate import generate
from phased_consistency.trainer.inference.edit import Editor
from phased_consistency.trainer.lora.install import install_by_diffusers
from phased_consistency.trainer.lora.recipe import recipe_for
from phased_consistency.trainer.studies.edit_baselines import cells_of, latent_mask
from phased_consistency.trainer.tiny.making import SD15
from phased_consistency.trainer.tiny.single_file import LATENT_SCALE, LATENT_SHIFT
from phased_consistency.trainer.training.loop import train
from support.bases import clip_config
from support.runs import small_config

PROMPTS = ["a red star", "a blue ring on a white background"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
# kind -> family, the host's checkpoint, what a saved latent is in the model's units
KINDS = {
    "sd15": ("sd15", "tiny.safetensors", lambda x: 0.18215 * x),
    "sdxl": ("sdxl", "sdxl.safetensors", lambda x: 0.13025 * x),
    "sdxl_v": ("sdxl", "sdxl_v.safetensors", lambda x: 0.13025 * x),
    "sd3": ("sd3", "sd3.safetensors", lambda x: (x - LATENT_SHIFT) * LATENT_SCALE),
}
WITH_VAE = pytest.mark.parametrize("trained", ["sd15", "sd3"], indirect=True)  # SDXL's has another than the file


def pipeline(kind: str) -> DiffusionPipeline:
    """The host tests' network with small random text encoders of the family's widths."""
    torch.manual_seed(1)
    words = CLIPTokenizer.from_pretrained(SD15 / "tokenizer")
    first, second = clip_config(words, 768, 768), clip_config(words, 1280, 1280)
    two = {"tokenizer": words, "tokenizer_2": words}
    if kind == "sd15":
        scheduler, checker = DDIMScheduler(**BETAS), {"safety_checker": None, "feature_extractor": None}
        parts = {"vae": make_sd15_vae(), "text_encoder": CLIPTextModel(first), "tokenizer": words}
        return StableDiffusionPipeline(
            unet=make_unet(), scheduler=scheduler, requires_safety_checker=False, **parts, **checker
        )
    if kind == "sd3":
        encoders = {f"text_encoder{n}": CLIPTextModelWithProjection(c) for n, c in (("", first), ("_2", second))}
        none, scheduler = {"text_encoder_3": None, "tokenizer_3": None}, FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(
            transformer=make_transformer(), vae=make_vae(), scheduler=scheduler, **encoders, **two, **none
        )
    encoders = {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}
    scheduler = DDIMScheduler(**BETAS, **(V if kind == "sdxl_v" else {}))
    return StableDiffusionXLPipeline(
        unet=make_sdxl_unet(), vae=AutoencoderTiny(), scheduler=scheduler, add_watermarker=False, **encoders, **two
    )


@pytest.fixture(scope="module", params=KINDS)
def trained(request, models, tmp_path_factory) -> SimpleNamespace:
    """Two updates on the network; the LoRA is put into the host's folder, the encodings of the prompts into a file."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    pipeline(kind).save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    changes = {"base__path": folder / "base", "data__resolution": 64, "data__prompts": folder / "prompts.txt"}
    changes |= {"data__count": 2, "data__teacher_steps": 2, "train__batch_size": 1, "train__steps": 2}
    config = small_config(folder / "run", name=f"trained_{kind}", **changes)
    lora = train(config)
    base = load_base(str(folder / "base"))
    install_by_diffusers(lora, base, "trained")
    (models.folder / "loras" / lora.name).write_bytes(lora.read_bytes())
    encodings = {f"{i} {k}": v for i, p in enumerate(PROMPTS) for k, v in base.encode_prompts([p]).items()}
    save_file(encodings, folder / "encodings.safetensors")
    recipe = recipe_for(config, base.facts)
    return SimpleNamespace(kind=kind, base=base, lora=lora, recipe=recipe, encodings=folder / "encodings.safetensors")


def by_trainer(trained: SimpleNamespace, steps: int, guidance: float) -> torch.Tensor:
    base, recipe = trained.base, trained.recipe
    noise = torch.randn(1, *base.latent_shape(64), generator=torch.Generator().manual_seed(7))
    prompt, negative = (base.encode_prompts([p]) for p in PROMPTS)
    return generate(base, prompt, negative, noise, recipe.grid().plan(steps).ticks, guidance, recipe.gamma)


def prompts_of(graph: Graph, links: dict[str, list], trained: SimpleNamespace) -> None:
    for number, name in enumerate(("positive", "negative")):
        links[name] = out(graph.add("TestEncoding", path=str(trained.encodings), number=number, side=64))


def by_host(server, trained: SimpleNamespace, steps: int, guidance: float) -> tuple[torch.Tensor, str]:
    family, checkpoint, in_model_units = KINDS[trained.kind]
    graph, links = loaded(trained.lora.name, checkpoint)
    prompts_of(graph, links, trained)
    if family == "sd3":
        links["latent"] = out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    run, (latent,) = server.latents(graph, sample(graph, links, steps=steps, cfg=guidance))
    return in_model_units(latent), run.text(links["model"][0])


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (2, 1.7)])
def test_the_host_draws_what_the_trainer_draws(server, trained, steps, guidance):
    """float32 on both sides, other kernels and order of sums: 1e-4 of the latent's size, and much less than the LoRA's
    own effect."""
    theirs, report = by_host(server, trained, steps, guidance)
    ours = by_trainer(trained, steps, guidance)
    trained.base.network.disable_adapters()
    bare = by_trainer(trained, steps, guidance)
    trained.base.network.enable_adapters()
    difference, effect = ((ours - x).norm() / ours.norm() for x in (theirs, bare))
    assert difference < 1e-4 and difference < 0.02 * effect, (difference, effect)
    modules = sum(hasattr(m, "lora_A") for m in trained.base.network.modules())
    assert f"{modules} of {modules} modules matched" in report


@WITH_VAE
def test_the_gallerys_baseline_is_the_hosts_masked_latent(server, trained):
    """Core's VAE Encode, Set Latent Noise Mask and euler, beside PCM Inpaint in docs/measurements/editing.md."""
    _, checkpoint, in_model_units = KINDS[trained.kind]
    graph, links = loaded(trained.lora.name, checkpoint)
    prompts_of(graph, links, trained)
    image_and_mask = picture(graph, 64, 64)
    encoded = graph.add("VAEEncode", pixels=image_and_mask["image"], vae=links["vae"])
    links["latent"] = out(graph.add("SetLatentNoiseMask", samples=out(encoded), mask=image_and_mask["mask"]))
    drawn = custom(graph, links, core_sampler(graph, "euler"), out(scheduler(graph, links)), cfg=1.7)
    _, (known, theirs) = server.latents(graph, encoded, drawn)
    prompt, negative = (trained.base.encode_prompts([p]) for p in PROMPTS)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:32, 21:32] = 1  # TestPicture's
    known = in_model_units(known)
    ticks = trained.recipe.grid().plan(4).ticks
    ours = latent_mask(trained.base, prompt, negative, known, cells_of(mask, known), ticks, 1.7, seed=7)
    plain = latent_mask(trained.base, prompt, negative, known, torch.ones(1, 1, 8, 8), ticks, 1.7, seed=7)
    difference, effect = ((ours - x).norm() / ours.norm() for x in (in_model_units(theirs), plain))
    assert difference < 1e-4 < 0.01 < effect, (difference, effect)


@WITH_VAE
def test_the_host_edits_as_the_trainer_does(server, trained, tmp_path):
    """One picture, one VAE, one seed: *PCM Colorize* and `Editor.edit`."""
    _, checkpoint, in_model_units = KINDS[trained.kind]
    image = torch.rand(1, 3, 50, 60)
    save_file({"image": image.movedim(1, -1).contiguous()}, tmp_path / "image.safetensors")
    graph, links = loaded(trained.lora.name, checkpoint)
    prompts_of(graph, links, trained)
    node = edit(graph, links, "Colorize", image=out(graph.add("TestImage", path=str(tmp_path / "image.safetensors"))))
    _, (theirs,) = server.tensors(graph, out(node, 1))
    prompt, negative = (trained.base.encode_prompts([p]) for p in PROMPTS)
    editor = Editor(trained.base, trained.recipe, negative, steps=2)
    ours, bare = (replace(editor, projection=p).edit(Colorize(image), prompt, 7).latents for p in ("picture", "none"))
    difference, effect = ((ours - x).norm() / ours.norm() for x in (in_model_units(theirs), bare))
    assert difference < 0.05 * effect, (difference, effect)  # a random VAE hands little of an edit on
