"""The nodes that sample: sigmas, a sampler, and both in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..samplers import LevelPlan, Recipe, Schedule, sample_phased
from ..samplers.phases import count_steps
from ..samplers.recipe import BARE
from ..samplers.sampling import NoiseSampler, Projection, block_noise, clamp_factor, seeded_noise
from . import inputs
from .embedded import embedded_warnings
from .experts import Relay, expert_note, expert_warnings, parts_of
from .frames import clip_fault, shift_fault
from .graph import has_negative_words, is_bare, model_path
from .guidance import cfg_to_judge, guides_at_one, schedule_in
from .host import fit_to_model, menu_of, schedule_of, show, speaking, warned
from .lora_on_model import (
    LOADED,
    MOVED,
    NO_RECIPE,
    model_family,
    moves,
    pixels_of,
    recipe_at,
    recipe_for,
    sampling_fault,
    shift_of,
    size_fault,
)
from .loras_in_graph import TWICE, few_step_loras
from .previews import preview_callback

BARE_MODEL = "No few-step LoRA here: the bare model is drawn. Is one merged in? Add PCM Recipe."
# Makes the `project` of `sample_phased` for what a guider samples, from x (B, C, h, w) on.
ProjectionMaker = Callable[[Any, Tensor], Projection]


class PCMScheduler(io.ComfyNode):
    """PCM Scheduler: the levels a recipe is sampled at, as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMScheduler",
            display_name="PCM Scheduler",
            category=menu_of("BasicScheduler"),
            description="Noise levels for a PCM or other few-step LoRA, exactly its own, for core custom sampling.",
            search_aliases=["pcm", "phased consistency", "trailing", "few-step sigmas", "lcm", "tcd", "sgm uniform"],
            inputs=[
                inputs.recipe("From Load PCM LoRA or PCM Recipe."),
                inputs.steps(),
                inputs.denoise(),
                io.Combo.Input(
                    "edges",
                    options=["authors'", "trained"],
                    default="authors'",
                    tooltip="The levels that the LoRA's authors sample at, or the edges it was trained on. They differ "
                    "only for some published files, such as PCM's for SD1.5 and SD3.",
                ),
                *inputs.picture_size(),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, steps: int, denoise: float, edges: str, recipe: Recipe | None = None, width: int = 1024, height: int = 1024
    ) -> io.NodeOutput:
        if recipe is None:
            raise ValueError(NO_RECIPE)
        recipe = recipe.at_size(width, height)
        steps = steps or recipe.steps
        plan = recipe.grid(trained=edges == "trained").plan_at_most(steps, denoise)
        # The recipe's own schedule, since no model is linked here: nothing on a model can move these levels.
        sigmas = recipe.schedule().k_sigma(plan.ticks)
        levels = ", ".join(f"{sigma:.4g}" for sigma in sigmas.tolist())
        notes = [*plan.notes, *expert_note(recipe, plan)]
        lines = [*warned(recipe.step_warnings(steps)), *notes, f"{count_steps(plan.steps)}, sigmas {levels}."]
        return io.NodeOutput(sigmas, ui=show(cls, lines))


class PCMSampler(io.ComfyNode):
    """PCM Sampler: phase jumps, as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMSampler",
            display_name="PCM Sampler",
            category=menu_of("KSamplerSelect"),
            description="The sampler for PCM and other few-step LoRAs, for core custom sampling: jumps from level to "
            "level, with as much fresh noise in between as the recipe says, or as you like.",
            search_aliases=["pcm", "phased consistency", "tcd", "gamma", "lcm", "lightning", "dmd2"],
            inputs=[*inputs.mode(), inputs.noise_between()],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, mode: str, gamma: float, recipe: Recipe | None = None, noise: str = inputs.NOISES[0]
    ) -> io.NodeOutput:
        inputs.check("noise", noise, inputs.NOISES)
        gamma = gamma_of("PCM Sampler", mode, gamma, recipe)
        return io.NodeOutput(sampler(gamma, recipe.min_alpha if recipe else 0.0, by_block=noise == inputs.NOISES[1]))


class PCMSample(io.ComfyNode):
    """Sample PCM: the whole of sampling in one node, with the recipe's settings as defaults."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMSample",
            display_name="Sample PCM",
            category=menu_of("KSampler"),
            description="Samples a PCM or other few-step LoRA as it was made to be sampled, and says on the node when "
            "a setting is off.",
            search_aliases=["pcm", "phased consistency", "few-step", "fast", "4 steps", "ksampler", "lcm", "lightning"],
            inputs=[
                inputs.model(),
                inputs.recipe(),
                inputs.seed(),
                inputs.steps(),
                inputs.cfg(),
                *inputs.prompts(),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent for text to image, an encoded picture for image to image."
                ),
                inputs.denoise(),
                inputs.low_noise_model(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The finished latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        seed: int,
        steps: int,
        cfg: float,
        positive,
        negative,
        latent_image,
        denoise: float,
        recipe: Recipe | None = None,
        low_noise_model=None,
    ) -> io.NodeOutput:
        latent = fit_to_model(model, latent_image)
        model, recipe = recipe_at(model, recipe_for(cls, model, recipe), *pixels_of(model, latent["samples"]))
        steps = steps or recipe.steps
        cfg = cfg or recipe.guidance
        plan = recipe.grid().plan_at_most(steps, denoise)

        # The node says what is wrong before it samples, so that one can stop it.
        lines = warned(expert_warnings(model, low_noise_model, recipe))
        lines += advice(cls, model, recipe, steps, cfg, plan, positive, latent["samples"])
        if denoise < 1 and is_empty(latent["samples"]):
            lines += warned(["The latent is empty: set denoise to 1, or connect a picture by VAE Encode."])
        text = show(cls, lines)

        noise = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
        experts = {"low_noise_model": low_noise_model}
        latent["samples"] = draw(model, recipe, plan, cfg, positive, negative, latent, noise, seed, **experts)
        return io.NodeOutput(latent, ui=text)


def is_empty(latent: Tensor) -> bool:
    """Whether there is nothing in a latent, as in those of core's empty latent nodes."""
    if latent.is_nested:  # video and sound in one
        return all(map(is_empty, latent.unbind()))
    return bool(latent.min() == latent.max())


def wiring(node: type[io.ComfyNode], model: Any, recipe: Recipe, cfg: float) -> list[str]:
    """Faults in the links of a sampling node, a sentence each, as far as the model and the graph show them."""
    graph = node.hidden.prompt
    node_id = node.hidden.unique_id
    path = model_path(graph, node_id)
    loaded = model.get_attachment(LOADED)
    kinds = [entry["class_type"] for entry in path]
    ours = [i for i, kind in enumerate(kinds) if kind in ("PCMLoadLora", "PCMRecipe")]

    warnings = []
    # The path has the last node first: LoRAs before Load PCM LoRA are behind it here, and it says so itself. What
    # PCM Recipe finds there, it goes by.
    if loaded and (others := few_step_loras(path[: min(ours, default=0)])):
        warnings.append(TWICE.format(others[0]))
    if recipe.objective == BARE:
        warnings.append(BARE_MODEL)
    elif not loaded and is_bare(path, model_family(model)):
        if "PCMLoadLora" in kinds:
            warnings.append(f"The LoRA is off: set the strength of Load PCM LoRA to {recipe.strength:g}.")
        elif "PCMRecipe" not in kinds:  # which says itself that nothing is known of the model
            warnings.append("No few-step LoRA on this model: connect that of Load PCM LoRA, unless one is merged in.")
    unguided = cfg == 1 and schedule_in(model) is None and not guides_at_one(model)
    if unguided and not recipe.negative_prompts and has_negative_words(graph, node_id):
        warnings.append("CFG 1 does not use the negative prompt: clear it, or take a LoRA made for CFG.")
    return warnings


def advice(
    node: type[io.ComfyNode],
    model: Any,
    recipe: Recipe,
    steps: int,
    cfg: float,
    plan: LevelPlan,
    positive: list,
    latent: Tensor | None = None,
) -> list[str]:
    """The sentences of a node that samples: faults of its links and settings, notes of the plan, settings.

    latent: what is to be drawn, where that may be a clip.
    """
    warnings = recipe.warnings(steps, cfg_to_judge(model, recipe, cfg), model_family(model), shift_of(model))
    if fault := sampling_fault(model, recipe):
        warnings.insert(0, fault)
    elif moves(model, plan.ticks):
        warnings.append(MOVED)

    warnings += embedded_warnings(node, recipe, positive)
    path = model_path(node.hidden.prompt, node.hidden.unique_id)
    if latent is not None and (fault := shift_fault(path, model, recipe, latent)):
        warnings.append(fault)

    schedule = schedule_in(model)
    cfg_text = schedule.text if schedule else f"CFG {cfg:g}"
    settings = f"{count_steps(plan.steps)} at {cfg_text}, {recipe.mode_text}."
    notes = [*plan.notes, *expert_note(recipe, plan)]
    return [*warned([*wiring(node, model, recipe, cfg), *warnings]), *notes, settings]


def draw(
    model: Any,
    recipe: Recipe,
    plan: LevelPlan,
    cfg: float,
    positive: list,
    negative: list,
    latent: dict[str, Any],
    noise: Tensor,
    seed: int,
    callback: Callable[..., None] | None = None,
    low_noise_model: Any | None = None,
    **hooks: Any,
) -> Tensor:
    """Sample a host latent from this noise as a recipe wants it, on the plan's levels; returns one of its shape.

    callback: of the host's kind; by default the one that shows previews. low_noise_model: the second expert, where the
    recipe has a boundary. hooks: as in `sampler`. Raises as `experts.parts_of`.
    """
    callback = callback or preview_callback(model, plan.steps)
    options = {"judged": True, "indices": latent.get("batch_index"), "relay": Relay(), **hooks}
    drawn = latent["samples"]
    for part in parts_of(model, low_noise_model, recipe, recipe.schedule().k_sigma(plan.ticks)):
        drawn = comfy.sample.sample_custom(
            part.model,
            noise,
            cfg,
            sampler(recipe.gamma, recipe.min_alpha, **options),
            part.sigmas,
            positive,
            negative,
            latent["samples"],
            noise_mask=latent.get("noise_mask"),
            callback=shifted(callback, part.before, plan.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    return drawn


def shifted(callback: Callable[..., None], before: int, total: int) -> Callable[..., None]:
    """A callback of the host's kind for one run of several, after so many steps of `total` in the runs before."""
    return lambda step, x0, x, _: callback(before + step, x0, x, total)


def gamma_of(title: str, mode: str, gamma: float, recipe: Recipe | None) -> float:
    """The gamma of `sample_phased` by the inputs of `inputs.mode`, on the node of this title.

    Raises ValueError for the mode 'from recipe' without a recipe, and for a mode that there is not.
    """
    inputs.check("mode", mode, inputs.MODES)
    if mode == "from recipe" and recipe is None:
        raise ValueError(
            f"{title} has the mode 'from recipe' but no recipe: connect that of Load PCM LoRA, or choose another mode."
        )
    if mode == "from recipe":
        return recipe.gamma
    return {"deterministic": 0.0, "stochastic": 1.0, "gamma": gamma}[mode]


def sampler(gamma: float, min_alpha: float, **hooks: Any) -> comfy.samplers.KSAMPLER:
    """`sample_phased` as a host SAMPLER, on the schedule of whatever model runs it.

    hooks: project_for, a `ProjectionMaker`, in an edit; noise_sampler, where the noise between steps is not
    to come from the seed; indices, of the pictures in the batch that they are of; by_block, for noise that is drawn
    as core draws it; relay, where several models go on with one run; judged, where the node that samples says itself
    which settings do not fit, so that the loader's `Watch` need not.
    """
    return comfy.samplers.KSAMPLER(_sample, {"gamma": gamma, "min_alpha": min_alpha, **hooks})


def options_of(chosen: Any) -> dict[str, Any] | None:
    """Options of a SAMPLER that `sampler` made: gamma, min_alpha and the hooks. None for another's SAMPLER."""
    return chosen.extra_options if getattr(chosen, "sampler_function", None) is _sample else None


def _sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    *,
    min_alpha: float,
    project_for: ProjectionMaker | None = None,
    indices: list[int] | None = None,
    by_block: bool = False,
    judged: bool = False,
    relay: Relay | None = None,
    **options: Any,
) -> Tensor:
    """`sample_phased` as the host calls a sampler; `judged` is for `options_of` alone.

    Only here is the model known: the SAMPLER was made before, and may run any. So the schedule is that of the
    model, with whatever patches it has by now, and not that of the recipe. Raises ValueError for a latent whose size
    or frames the model cannot draw.
    """
    guider = model.inner_model
    patcher = guider.model_patcher
    if fault := size_fault(patcher, *pixels_of(patcher, x)) or clip_fault(patcher, x):
        raise ValueError(fault)
    schedule = schedule_of(guider.inner_model.model_sampling)
    options["project"] = project_for(guider, x) if project_for else None
    relay = relay or Relay()
    noise_sampler = options.get("noise_sampler") or relay.noise_sampler
    if noise_sampler is None and (seed := options["extra_args"].get("seed")) is not None:
        noise_sampler = block_noise(x, seed) if by_block else seeded_noise(x, seed, indices)
        noise_sampler = scaled(noise_sampler, getattr(guider.inner_model.model_sampling, "noise_scale", 1.0))
    options["noise_sampler"] = relay.noise_sampler = noise_sampler
    if min_alpha and options["extra_args"].get("denoise_mask") is not None:
        model = _unclamped_rest(model, schedule, min_alpha)
    # The host has put the noise into x anew: an expert goes on from where the one before it has come to.
    x = x if relay.x is None else relay.x.to(x)
    relay.x = sample_phased(model, x, sigmas, schedule=schedule, min_alpha=min_alpha, **options)
    return relay.x


def scaled(noise_sampler: NoiseSampler, scale: float) -> NoiseSampler:
    """Noise as strong as the model knows it: some pixel models have `scale` times that of others."""
    return noise_sampler if scale == 1 else lambda *levels: scale * noise_sampler(*levels)


def _unclamped_rest(model: Any, schedule: Schedule, min_alpha: float) -> Callable[..., Tensor]:
    """The model, with the part of x0 that a mask keeps divided by `clamp_factor`.

    The host has put the latent that is kept into x0 already, and `sample_phased` goes on to multiply all of
    x0 by the factor. Divided by it before, the kept part comes out as it was.
    """

    def denoised(x: Tensor, sigma: Tensor, denoise_mask: Tensor, model_options: dict[str, Any], **extra: Any) -> Tensor:
        x0 = model(x, sigma, denoise_mask=denoise_mask, model_options=model_options, **extra)
        # The mask as the host has applied it: DifferentialDiffusion gives it a threshold at each level.
        if mask_function := model_options.get("denoise_mask_function"):
            extra_options = {"model": model.inner_model, "sigmas": model.sigmas}
            denoise_mask = mask_function(sigma, denoise_mask, extra_options=extra_options)
        kept = (1 - denoise_mask) * model.latent_image
        return x0 + (1 / clamp_factor(schedule, sigma[0], min_alpha) - 1) * kept

    return denoised
