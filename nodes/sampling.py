"""The nodes that sample: sigmas, a sampler, and both in one."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io
from torch import Tensor

from ..samplers import Recipe, sample_phased
from ..samplers.phases import count_steps
from ..samplers.sampling import clamp_factor
from .host import RecipeType, fit_to_model, menu_of, schedule_of, show, supported
from .lora import model_family, moves, on_schedule_of, shift_of

STEPS = {
    "default": 0,
    "min": 0,
    "max": 100,
    "tooltip": "0: as the recipe recommends. A deterministic LoRA is made for exactly one number of steps.",
}
DENOISE = {
    "default": 1.0,
    "min": 0.01,
    "max": 1.0,
    "step": 0.01,
    "tooltip": "1 draws from noise alone; below 1 keeps more of the given latent. The start moves to the nearest phase "
    "edge of the LoRA, so fewer steps run, and the node says which strength that is.",
}


class PCMScheduler(io.ComfyNode):
    """PCM Scheduler: the levels a recipe is sampled at, as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="PCMScheduler",
            display_name="PCM Scheduler",
            category=menu_of("BasicScheduler"),
            description="Noise levels for a PCM or other few-step LoRA, exactly its own, for core custom sampling.",
            search_aliases=["pcm", "phased consistency", "trailing", "few-step sigmas", "lcm", "tcd", "sgm uniform"],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,  # what it says is repeated when the node is cached
            inputs=[
                RecipeType.Input("recipe", tooltip="From Load PCM LoRA."),
                io.Int.Input("steps", **STEPS),
                io.Float.Input("denoise", **DENOISE),
                io.Combo.Input(
                    "edges",
                    options=["authors'", "trained"],
                    default="authors'",
                    tooltip="The levels that the LoRA's authors sample at, or the edges it was trained on. They differ "
                    "only for some published files, such as PCM's for SD1.5 and SD3.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, recipe: Recipe, steps: int, denoise: float, edges: str) -> io.NodeOutput:
        plan = recipe.grid(trained=edges == "trained").plan(steps or recipe.steps, denoise)
        sigmas = recipe.schedule().k_sigma(plan.ticks)
        levels = ", ".join(f"{sigma:.4g}" for sigma in sigmas.tolist())
        return io.NodeOutput(sigmas, ui=show(cls, [*plan.notes, f"{count_steps(plan.steps)}, sigmas {levels}."]))


class PCMSampler(io.ComfyNode):
    """PCM Sampler: phase jumps, as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="PCMSampler",
            display_name="PCM Sampler",
            category=menu_of("KSamplerSelect"),
            description="The sampler for PCM and other few-step LoRAs, for core custom sampling: jumps from level to "
            "level, with as much fresh noise in between as the recipe says, or as you like.",
            search_aliases=["pcm", "phased consistency", "tcd", "gamma", "lcm", "lightning", "dmd2"],
            inputs=[
                RecipeType.Input(
                    "recipe",
                    optional=True,
                    tooltip="From Load PCM LoRA. Needed for the mode 'from recipe', and by some one-step LoRAs in any.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["from recipe", "deterministic", "stochastic", "gamma"],
                    default="from recipe",
                    tooltip="deterministic adds no noise between steps. stochastic takes all noise fresh, as the lcm "
                    "sampler does. gamma mixes the two. Other than the LoRA's own is for trying things out.",
                ),
                io.Float.Input(
                    "gamma",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Used only in the mode 'gamma'. 0 is deterministic, 1 all noise fresh; TCD uses 0.3.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, mode: str, gamma: float, recipe: Recipe | None = None) -> io.NodeOutput:
        if mode == "from recipe" and recipe is None:
            raise ValueError(
                "PCM Sampler has the mode 'from recipe' but no recipe: connect that of Load PCM LoRA, "
                "or choose another mode."
            )
        modes = {"deterministic": 0.0, "stochastic": 1.0, "gamma": gamma}
        gamma = recipe.gamma if mode == "from recipe" else modes[mode]
        return io.NodeOutput(sampler(gamma, recipe.min_alpha if recipe else 0.0))


class PCMSample(io.ComfyNode):
    """Sample PCM: the whole of sampling in one node, with the recipe's settings as defaults."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="PCMSample",
            display_name="Sample PCM",
            category=menu_of("KSampler"),
            description="Samples a PCM or other few-step LoRA as it was made to be sampled, and says on the node when "
            "a setting is off.",
            search_aliases=["pcm", "phased consistency", "few-step", "fast", "4 steps", "ksampler", "lcm", "lightning"],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,  # what it says is repeated when the node is cached
            inputs=[
                io.Model.Input(
                    "model", tooltip="From Load PCM LoRA, with other LoRAs or patches after it if you like."
                ),
                RecipeType.Input("recipe", tooltip="From Load PCM LoRA."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="One seed is one picture, on every device.",
                ),
                io.Int.Input("steps", **STEPS),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    round=0.01,
                    tooltip="0: as the recipe recommends. 1 is no guidance: the negative prompt is not used, and a "
                    "step takes half the time. Above the LoRA's range the picture burns.",
                ),
                io.Conditioning.Input("positive", tooltip="What to show."),
                io.Conditioning.Input("negative", tooltip="What to avoid. Used only when CFG is not 1."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent for text to image, an encoded picture for image to image."
                ),
                io.Float.Input("denoise", **DENOISE),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The finished latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, recipe: Recipe, seed: int, steps: int, cfg: float, positive, negative, latent_image, denoise: float
    ) -> io.NodeOutput:
        recipe = on_schedule_of(model, recipe)  # a ModelSamplingDiscrete may have come after Load PCM LoRA
        steps, cfg = steps or recipe.steps, cfg or recipe.guidance
        plan = recipe.grid().plan(steps, denoise)
        settings = f"{count_steps(plan.steps)} at CFG {cfg:g}, {recipe.mode_text}."
        warnings = recipe.warnings(steps, cfg, model_family(model), shift_of(model))
        if moves(model, plan.ticks):
            warnings.append("ModelSamplingDiscrete (lcm) moves timesteps by up to 10: remove that node.")
        text = show(cls, [*warnings, *plan.notes, settings])
        latent = fit_to_model(model, latent_image)
        latent["samples"] = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index")),
            cfg,
            sampler(recipe.gamma, recipe.min_alpha),
            recipe.schedule().k_sigma(plan.ticks),
            positive,
            negative,
            latent["samples"],
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, plan.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput(latent, ui=text)


def sampler(gamma: float, min_alpha: float) -> comfy.samplers.KSAMPLER:
    """`sample_phased` as a host SAMPLER, on the schedule of whatever model runs it."""
    return comfy.samplers.KSAMPLER(_sample, {"gamma": gamma, "min_alpha": min_alpha})


def _sample(model: Any, x: Tensor, sigmas: Tensor, *, min_alpha: float, **options: Any) -> Tensor:
    schedule = schedule_of(model.inner_model.inner_model.model_sampling)
    x = sample_phased(model, x, sigmas, schedule=schedule, min_alpha=min_alpha, **options)
    extra = options.get("extra_args") or {}
    mask = extra.get("denoise_mask")
    if not min_alpha or mask is None:
        return x
    # The host has put the latent that is kept into x0 already, where the clamp has scaled it too: give back the rest.
    sigma = sigmas[-2]
    if masking := extra.get("model_options", {}).get("denoise_mask_function"):
        mask = masking(sigma * x.new_ones(len(x)), mask, extra_options={"model": model.inner_model, "sigmas": sigmas})
    return x + (1 - clamp_factor(schedule, sigma, min_alpha)) * (1 - mask) * model.latent_image
