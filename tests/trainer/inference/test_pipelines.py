"""diffusers' pipelines with `PCMScheduler` on the three tiny bases, beside `pcm sample`'s own drawing."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.families import Base, load_base
from phased_consistency.trainer.families.generate import draw, unit_noise
from phased_consistency.trainer.inference.scheduler import PCMScheduler
from phased_consistency.trainer.lora.install import installed
from phased_consistency.trainer.tiny.bundled import bundled_folder
from support.sharing_files import kohya_file

KINDS = {
    "tiny-sd15": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
    "tiny-sdxl": (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
    "tiny-emoji": (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline),
}
PROMPTS = {"tiny-emoji": ["a fox on a blue background", "a panda on a green background"]}
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
SIDE = 64


@dataclass
class Pair:
    """A base of ours and its pipeline, with one LoRA, and the prompts that both draw."""

    base: Base
    lora: Path
    pipe: DiffusionPipeline
    image_pipe: type[DiffusionPipeline]
    prompts: list[str]

    @property
    def recipe(self) -> Recipe:
        return self.pipe.scheduler.recipe

    def ours(self, noise, ticks, guidance, **options):
        condition = self.base.encode_prompts(self.prompts)
        null = self.base.null_condition(self.base.encode_prompts([""]))
        with installed(self.lora, self.base):
            return draw(self.base, self.recipe, condition, null, noise, ticks, guidance=guidance, **options)

    def words(self, guidance):
        """The prompts as the pipeline takes them: SD3's puts zeros for a missing T5, which ours leaves out."""
        if not isinstance(self.pipe, StableDiffusion3Pipeline):
            return {"prompt": self.prompts}
        condition = self.base.encode_prompts(self.prompts)
        null = self.base.null_condition(self.base.encode_prompts([""]))
        words = {"prompt_embeds": condition["hidden"], "pooled_prompt_embeds": condition["pooled"]}
        if guidance > 1:
            nothing = {key: value.expand(len(self.prompts), *value.shape[1:]) for key, value in null.items()}
            words |= {"negative_prompt_embeds": nothing["hidden"], "negative_pooled_prompt_embeds": nothing["pooled"]}
        return words


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    name = request.param
    folder, base = bundled_folder(name), load_base(name)
    kind, image_kind = KINDS[name]
    flow = base.prediction == "flow"
    pipe = kind.from_pretrained(folder, dtype=torch.float32, **(WITHOUT_T5 if flow else {}))
    pipe.set_progress_bar_config(disable=True)

    if flow:
        lora = folder / "pcm_demo_emoji_4step.safetensors"
    else:
        recipe = Recipe(family=base.name, prediction=base.prediction, zero_terminal_snr=base.zero_terminal_snr)
        lora = tmp_path_factory.mktemp(name) / "lora.safetensors"
        kohya_file(lora, base, **{HEADER_KEY: recipe.to_header()})
        pipe.unet.to(memory_format=torch.channels_last)  # as ours: another order of sums has other last bits
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    pipe.scheduler = PCMScheduler.from_lora(lora, pipe.scheduler)
    return Pair(base, lora, pipe, image_kind, PROMPTS.get(name, ["a red circle", "a blue square"]))


def noise_for(pair):
    return unit_noise((2, *pair.base.latent_shape(SIDE)), seed=1)


def drawn_by(pair, guidance, **options):
    sides = {"height": SIDE, "width": SIDE}
    return pair.pipe(
        **pair.words(guidance), num_inference_steps=4, guidance_scale=guidance, output_type="latent", **sides, **options
    ).images


def test_a_pipeline_draws_what_pcm_sample_draws_bit_for_bit(pair):
    ticks = pair.recipe.grid().plan(4).ticks
    assert torch.equal(drawn_by(pair, 1.0, latents=noise_for(pair)), pair.ours(noise_for(pair), ticks, 1.0))


def test_with_guidance_it_draws_the_same_picture(pair):
    """A pipeline guides the output and ours x0: the same line, with other last bits."""
    ticks = pair.recipe.grid().plan(4).ticks
    theirs, ours = drawn_by(pair, 2.0, latents=noise_for(pair)), pair.ours(noise_for(pair), ticks, 2.0)
    assert (theirs - ours).abs().max() < 1e-4 * ours.std()


def test_image_to_image_is_the_edit_of_the_same_strength(pair):
    pipe = pair.image_pipe(**pair.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    noise = unit_noise((2, *pair.base.latent_shape(SIDE)), seed=3)
    picture = unit_noise(noise.shape, seed=4)  # latents, which pipelines take as they are
    strength = pipe.scheduler.snapped_strength(0.65, 4)
    size = {"original_size": (SIDE, SIDE), "target_size": (SIDE, SIDE)} if pair.base.name == "sdxl" else {}

    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    theirs = pipe(
        **pair.words(1.0),
        image=picture,
        strength=strength,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=generators,
        output_type="latent",
        **size,
    ).images
    drawn = unit_noise((1, *noise.shape[1:]), seed=7).repeat(2, 1, 1, 1)
    plan = pair.recipe.grid().plan(4, 0.65)
    assert plan.denoise == 0.75
    assert torch.equal(theirs, pair.ours(drawn, plan.ticks, 1.0, start=picture))


def test_a_saved_pipeline_remembers_its_scheduler(tiny_base, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(bundled_folder("tiny-sd15"), dtype=torch.float32)
    pipe.scheduler = PCMScheduler.from_recipe(Recipe(family="sd15", phases=2))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["phased_consistency.trainer.inference.scheduler", "PCMScheduler"]
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.scheduler.recipe == Recipe(family="sd15", phases=2)
    base = load_base(str(tmp_path))  # which reads the betas, as of any scheduler
    assert torch.equal(base.schedule.k_sigma(1000), tiny_base.schedule.k_sigma(1000))
