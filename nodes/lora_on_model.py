"""A host MODEL as a few-step LoRA meets it: its family, its prediction, its schedule and its shift."""

from __future__ import annotations

import copy
import inspect
import math
import re
from dataclasses import replace
from typing import Any

import comfy.model_base
import comfy.model_sampling
import comfy.supported_models
from comfy_api.latest import io
from torch import Tensor

from ..samplers import Recipe
from ..samplers.families import FAMILIES, HOST_FAMILIES
from ..samplers.recipe import BARE, DISTILLED_POINTS, same_shift
from ..samplers.schedule import PREDICTIONS, TICKS
from .graph import is_bare, model_path
from .host import core, flow_shift

CONFIGS = {
    "sd15": comfy.supported_models.SD15,
    "sd2": comfy.supported_models.SD20,
    "sdxl": comfy.supported_models.SDXL,
    "sd3": comfy.supported_models.SD3,
}
LEVELS = ("even", "lcm")  # of a recipe by hand: evenly spaced, or those of LCM and TCD
LOADED = "pcm_lora"  # attachment of a model: the name of the file that makes it a few-step one, or `BY_NODE`
BY_NODE = "PCM Recipe"  # by its widgets: the model is made for few steps, and by no file that is known
CARRIED = "pcm_recipe"  # attachment: how it is to be sampled
OTHER_PREDICTION = {  # the prediction that a LoRA was made on -> the sentence where the model has another
    "epsilon": "Made for models that predict noise, not this kind: load another checkpoint.",
    "v_prediction": "Made for v-prediction: load such a model, or put ModelSamplingDiscrete before.",
    "flow": "Made for flow models, not this kind: load another checkpoint.",
}
BARE_STEPS = 25
NO_RECIPE = (
    "No recipe is connected, and the model carries none: connect the recipe of Load PCM LoRA, which may be bypassed. "
    "For a model with a few-step LoRA merged in, put PCM Recipe after its loader."
)
EDM_BASE = "An EDM model (CosXL, Playground 2.5): no LoRA here knows its noise levels. Take another."
NO_NOISE = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())  # 0.3.64 has none
EDM = (comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.ModelSamplingDiscreteEDM)
MOVED = "ModelSamplingDiscrete (lcm) moves timesteps by up to 10: remove that node."
ZERO_TERMINAL_SIGMA = 1000  # an ordinary VP schedule ends at 14.6, one with zero terminal SNR at about 4500


def model_family(model: Any) -> str:
    """Family of a host MODEL: a key of `FAMILIES`, else what the host calls its kind of network."""
    config = model.model.model_config
    family = next((family for family, kind in CONFIGS.items() if isinstance(config, kind)), None)
    name = str(config.unet_config.get("image_model", type(config).__name__))
    return family or re.sub(r"[^a-z0-9_.-]+", "_", name.lower())


def flow_family(model: Any) -> str | None:
    """`model_family` of a host MODEL whose LoRAs do not tell it by their tensors; None where they do."""
    family = model_family(model)
    return None if family in FAMILIES else family


def model_title(model: Any) -> str:
    """The family of a host MODEL as people write it, or the host's own name for the model."""
    family = model_family(model)
    return FAMILIES.get(family) or HOST_FAMILIES.get(family) or type(model.model.model_config).__name__


def prediction_of(model_sampling: Any) -> str:
    """The prediction of the network behind a host `model_sampling`, one of `schedule.PREDICTIONS`; "none" for one that
    starts from a picture and no noise."""
    if counts_ratios(model_sampling):
        return "flow"
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return "none" if isinstance(model_sampling, NO_NOISE) else "flow"
    return "v_prediction" if isinstance(model_sampling, comfy.model_sampling.V_PREDICTION) else "epsilon"


def counts_ratios(model_sampling: Any) -> bool:
    """Whether a host's `model_sampling` is a flow model's whose levels are sigma / alpha, as Cosmos Predict2's."""
    return isinstance(model_sampling, comfy.model_sampling.COSMOS_RFLOW)


def known_family(model: Any) -> str:
    """`model_family`. Raises ValueError for a model that is neither a flow model nor of a family known here."""
    family = model_family(model)
    if family not in FAMILIES and prediction_of(model.get_model_object("model_sampling")) != "flow":
        raise ValueError(
            f"No recipe can be made for a {model_title(model)} model: it is no flow model, and none of "
            f"{', '.join(FAMILIES.values())}. Load its LoRA with LoraLoaderModelOnly, and set steps, cfg, sampler_name "
            "and scheduler of KSampler as its authors say."
        )
    return family


def recipe_from_widgets(
    model: Any,
    phases: int,
    mode: str,
    cfg: float,
    gamma: float = 1.0,
    levels: str = LEVELS[0],
    sigmas: str = "",
    timesteps: str = "",
    shift: float = 0.0,
    boundary: float = 0.0,
) -> Recipe:
    """A recipe for a file that carries none, on the schedule of the model it is used with.

    The widgets are those of `inputs.recipe_widgets`; gamma: for the mode "stochastic".
    Raises ValueError when no recipe can be made for the model, phases is out of range, or the levels are no list of
    what this model takes.
    """
    sampling = model.get_model_object("model_sampling")
    prediction = prediction_of(sampling)
    given = {
        "sigmas": numbers_in("sigmas", sigmas),
        "timesteps": numbers_in("timesteps", timesteps, has_clean_end=prediction == "flow"),
    }
    has_list = any(given.values())
    distilled = levels == LEVELS[1] and not has_list
    recipe = Recipe(
        family=known_family(model),
        objective="unknown",
        mode=mode,
        points=100 if prediction == "flow" else 40,
        phases=phases if mode == "deterministic" else 1,
        steps=None if has_list else phases,
        **given,
        gamma=0.0 if mode == "deterministic" else gamma,
        sampling_points=DISTILLED_POINTS if distilled else None,
        sampling_from_noise=distilled,
        prediction=prediction,
        shift=shift or (flow_shift(sampling) if prediction == "flow" else None),
        boundary=boundary or None,
        guidance=cfg,
        guidance_min=min(cfg, 1.0),
        guidance_max=cfg + 1,
    )
    return on_schedule_of(model, recipe)


def numbers_in(name: str, text: str, has_clean_end: bool = True) -> tuple[float, ...] | None:
    """The levels in a widget's text, such as "1, 0.65, 0.3, 0"; None for an empty one.

    has_clean_end: whether a 0 at the end is no level but the clean end, which recipes leave out.
    Raises ValueError for other text.
    """
    words = [word for word in re.split(r"[\s,;\[\]()]+", text) if word]
    try:
        numbers = tuple(map(float, words))
    except ValueError as error:
        raise ValueError(f"{name} is {text!r:.200}: write numbers with commas, such as 1, 0.75, 0.5.") from error
    ends_clean = has_clean_end and len(numbers) > 1 and numbers[-1] == 0
    return (numbers[:-1] if ends_clean else numbers) or None


def on_schedule_of(model: Any, recipe: Recipe) -> Recipe:
    """The recipe with its last level where this model's schedule ends: with zero terminal SNR, or without; of a flow
    model whose levels are ratios, at the one that it has for pure noise.

    A recipe is read once, from a file; the model may be another checkpoint, or be patched after the loader.
    """
    sampling = model.get_model_object("model_sampling")
    last = float(sampling.sigma_max)
    if recipe.prediction == "flow":
        noisiest = last if counts_ratios(sampling) else None
        return recipe if recipe.noisiest == noisiest else replace(recipe, noisiest=noisiest)
    return replace(recipe, zero_terminal_snr=last > ZERO_TERMINAL_SIGMA)


def recipe_for(node: type[io.ComfyNode], model: Any, recipe: Recipe | None) -> Recipe:
    """The recipe that a node samples a host MODEL by: the one that is connected, else the one that the model carries,
    on the model's own schedule (`on_schedule_of`).

    Where there is neither and the graph shows no few-step LoRA, as behind a Load PCM LoRA that is bypassed, that of
    the bare model. Raises ValueError where none is known.
    """
    recipe = recipe or model.get_attachment(CARRIED)
    if recipe is None and is_bare(model_path(node.hidden.prompt, node.hidden.unique_id), model_family(model)):
        recipe = bare_recipe(model)
    if recipe is None:
        known_family(model)
        raise ValueError(NO_RECIPE)
    return on_schedule_of(model, recipe)


def bare_recipe(model: Any) -> Recipe | None:
    """How a host MODEL without a few-step LoRA is sampled; None for one of a family whose usual settings vary."""
    family = model_family(model)
    prediction = prediction_of(model.get_model_object("model_sampling"))
    if family not in FAMILIES or prediction not in PREDICTIONS:
        return None
    return Recipe(
        family=family,
        objective=BARE,
        points=TICKS,
        phases=BARE_STEPS,
        steps=BARE_STEPS,
        prediction=prediction,
        shift=shift_of(model),
        guidance=4.0 if prediction == "flow" else 7.0,
        guidance_max=20.0,
        negative_prompts=True,
    )


def carrying(model: Any, recipe: Recipe, name: str | None) -> Any:
    """A host MODEL, already a clone, with a recipe to be sampled by and its shift.

    name: of the file that the recipe is of, or `BY_NODE`; None where it is not known whether the model is fast.
    """
    if name:
        model.set_attachments(LOADED, name)
    model.set_attachments(CARRIED, recipe)
    set_shift(model, recipe.shift)
    return model


def sampling_fault(model: Any, recipe: Recipe) -> str | None:
    """The sentence for a model whose prediction or noise levels are of another kind than the recipe's, or None.

    Where a node has set them, such as core's ModelSamplingDiscrete, it is named.
    """
    sampling = model.get_model_object("model_sampling")
    # The network's own kind: while a model is loaded, its `model_sampling` is that of the last patch.
    of_ratios = model.model.model_type is comfy.model_base.ModelType.FLOW_COSMOS
    is_edm = isinstance(sampling, EDM) and not of_ratios
    is_counted_otherwise = is_edm or counts_ratios(sampling) != of_ratios
    predicts_x0 = isinstance(sampling, comfy.model_sampling.X0)  # which is a kind of EPS in the host
    if prediction_of(sampling) == recipe.prediction and not is_counted_otherwise and not predicts_x0:
        return None
    if "model_sampling" not in model.object_patches:
        return EDM_BASE if is_edm else OTHER_PREDICTION[recipe.prediction]
    # Core's nodes make a class of their own, whose base is called as the node is.
    node = next(
        (kind.__name__ for kind in type(sampling).__mro__ if kind.__name__ in core.NODE_CLASS_MAPPINGS), "A node"
    )
    return (
        f"{node} changes {'the noise levels' if is_counted_otherwise else 'what the model predicts'}: remove that node."
    )


def on_schedule_if_set(model: Any, recipe: Recipe) -> Recipe:
    """`on_schedule_of`, unless the recipe wants a zero terminal SNR that this model may get later, by a node.

    The host takes a v-prediction checkpoint that carries no mark for one of epsilon, until a
    ModelSamplingDiscrete after the loader says otherwise.
    """
    prediction = prediction_of(model.get_model_object("model_sampling"))
    awaits = recipe.zero_terminal_snr and prediction != recipe.prediction
    return recipe if awaits else on_schedule_of(model, recipe)


def pixels_of(model: Any, latent: Tensor) -> tuple[int, int]:
    """Height and width of what a host latent is of, in pixels; of video and sound in one, the video's."""
    latent = latent.unbind()[0] if latent.is_nested else latent
    height, width = latent.shape[-2:]
    return cell_of(model) * height, cell_of(model) * width


def cell_of(model: Any) -> int:
    """Pixels that a cell of a host MODEL's latents is of, along a side."""
    return getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)  # 0.3.64 has none


def size_fault(model: Any, height: int, width: int) -> str | None:
    """The sentence for a size in pixels beyond the position embeddings of a host MODEL, or None.

    SD3 and AuraFlow have a table of them; other networks compute them, or have none, and take any size.
    """
    network = getattr(model.model, "diffusion_model", None)
    in_sd3 = getattr(network, "pos_embed", None) is not None
    patches = getattr(network, "pos_embed_max_size" if in_sd3 else "h_max", None)
    if not patches:
        return None
    largest = patches * network.patch_size * cell_of(model)
    if max(height, width) <= largest:
        return None
    return (
        f"{width} x {height} pixels are too many: this {model_title(model)} model draws at most {largest} on an edge. "
        f"Set width and height to {largest} or less, or make the picture smaller before."
    )


def recipe_at(model: Any, recipe: Recipe, height: int, width: int) -> tuple[Any, Recipe]:
    """A host MODEL and a recipe with the shift that the recipe has for a size in pixels (`Recipe.at_size`).

    The model keeps a shift that a node after the loader has set. Raises ValueError for a size that the model cannot
    draw (`size_fault`).
    """
    if fault := size_fault(model, height, width):
        raise ValueError(fault)
    if recipe.mu_by_size is None:
        return model, recipe
    sized = recipe.at_size(width, height)
    if same_shift(shift_of(model) or 0, recipe.shift):
        model = model.clone()
        set_shift(model, sized.shift)
    return model, sized


def recipe_seen(model: Any, recipe: Recipe, latent: Tensor) -> Recipe:
    """The recipe by which a host MODEL as it is can be sampled right: with the shift for this latent's size where the
    model has that, else with the usual one."""
    if recipe.mu_by_size is None:
        return recipe
    height, width = pixels_of(model, latent)
    sized = recipe.at_size(width, height)
    return sized if same_shift(shift_of(model) or 0, sized.shift) else recipe


def is_on_base_schedule(model: Any, recipe: Recipe) -> bool:
    """Whether the model's noisiest level is that of the recipe's base; with AnimateDiff's betas it is another."""
    last = float(model.get_model_object("model_sampling").sigma_max)
    return abs(last / float(recipe.schedule().k_sigma(TICKS)) - 1) < 0.01


def moves(model: Any, ticks: tuple[int, ...]) -> bool:
    """Whether the model lacks one of these levels: a ModelSamplingDiscrete (lcm) has left it LCM's 50 alone."""
    points = len(model.get_model_object("model_sampling").sigmas)
    return points == DISTILLED_POINTS and any(tick % (TICKS // points) for tick in ticks)


def shift_of(model: Any) -> float | None:
    """The flow time shift that a host MODEL has now; None for those that have none."""
    sampling = model.get_model_object("model_sampling")
    return flow_shift(sampling) if prediction_of(sampling) == "flow" and hasattr(sampling, "shift") else None


def set_shift(model: Any, shift: float | None) -> None:
    """Give a clone of a MODEL this flow shift, as core's ModelSamplingSD3 does.

    Nothing is done where the recipe has none, or the model has it or is no flow model. The recipe's own
    levels are sigmas and need no such thing. It is for what goes by the model: schedulers of the host, gamma,
    and the step ranges of ControlNets and prompts.
    """
    now = shift_of(model)
    if shift is None or now is None or same_shift(shift, now):
        return
    # A copy, since clones of a MODEL share the object, and setting it would reach those without the LoRA.
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    is_mu = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
    parameters = inspect.signature(sampling.set_parameters).parameters
    kept = {name: getattr(sampling, name) for name in parameters if hasattr(sampling, name)}
    sampling.set_parameters(**kept | {"shift": math.log(shift) if is_mu else shift})
    model.add_object_patch("model_sampling", sampling)
