"""A LoRA file against the model it is to patch: family, which modules fit, and loading under names the host knows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch

from ..samplers import Recipe
from ..samplers.lora_file import LoraHeader, LoraModule, not_finite
from ..samplers.phases import count_steps
from ..samplers.recipe import DISTILLED_POINTS, FAMILIES, SOURCES
from ..samplers.schedule import TICKS

CONFIGS = {
    "sd15": comfy.supported_models.SD15,
    "sd2": comfy.supported_models.SD20,
    "sdxl": comfy.supported_models.SDXL,
    "sd3": comfy.supported_models.SD3,
}
LOADED = "pcm_lora"  # attachment of a patched model: the name of the few-step LoRA that it has
TWICE = "{} is loaded too, and both speed the model up: remove one."
MOVED = "ModelSamplingDiscrete (lcm) moves timesteps by up to 10: remove that node."
OFF = "Strength 0: the LoRA is off, and the model is as it came."
# Shares of a recipe's strength that people take on purpose, beside other LoRAs or on merged models.
USUAL = (0.7, 1.1)
OTHER_PREDICTION = {  # the prediction that a LoRA was made on -> the sentence where the model has another
    "epsilon": "Made for models that predict noise, not this kind: load another checkpoint.",
    "v_prediction": "Made for v-prediction: load such a model, or put ModelSamplingDiscrete before.",
    "flow": "Made for flow models, not this kind: load another checkpoint.",
}
ZERO_TERMINAL_SIGMA = 1000  # an ordinary VP schedule ends at 14.6, one with zero terminal SNR at about 4500


@dataclass(frozen=True)
class LoraMatch:
    """Modules of a LoRA by whether they have a weight of the right shape in a model.

    names: kohya module name -> the name this host maps, for the modules that fit.
    misfits: kohya module names of the modules that do not.
    text_modules: number of modules of text encoders, which are not patched here.
    """

    names: dict[str, str]
    misfits: list[str]
    text_modules: int

    @property
    def total(self) -> int:
        return len(self.names) + len(self.misfits)


def model_family(model: Any) -> str | None:
    """Family of a host MODEL, a key of `FAMILIES`; None for any other."""
    config = model.model.model_config
    return next((family for family, kind in CONFIGS.items() if isinstance(config, kind)), None)


def model_title(model: Any) -> str:
    """The family of a host MODEL as people write it, or the host's own name for it."""
    family = model_family(model)
    return FAMILIES[family] if family else type(model.model.model_config).__name__


def match(header: LoraHeader, model: Any) -> LoraMatch:
    """Match a LoRA's modules with the weights of a host MODEL, by name and by shape.

    By both, since a LoRA of another family shares names, and some shapes, with this model.
    """
    targets = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model.state_dict()
    names: dict[str, str] = {}
    misfits: list[str] = []
    text_modules = 0
    for module, tensors in header.modules.items():
        if module.startswith("lora_te"):
            text_modules += 1
            continue
        # SD3's modules have no lora_unet_ names in the host, but lora_transformer_ ones.
        candidates = (module, module.replace("lora_unet_", "lora_transformer_", 1))
        name = next((candidate for candidate in candidates if candidate in targets), None)
        shape = _shape(targets[name], weights) if name is not None else None
        if shape is not None and tensors.fits(shape):
            names[module] = name
        else:
            misfits.append(module)
    return LoraMatch(names, misfits, text_modules)


def _shape(target: str | tuple, weights: dict[str, torch.Tensor]) -> tuple[int, ...] | None:
    """Shape of the weight, or of a fused one's slice (key, (dim, start, length)), for a LoRA name's target.

    None where there is no such weight: the host has names for a middle block even in models that have none.
    """
    key, part = (target, None) if isinstance(target, str) else target[:2]
    if key not in weights:
        return None
    shape = list(weights[key].shape)
    if part is not None:
        dim, _, length = part
        shape[dim] = length
    return tuple(shape)


def check(header: LoraHeader, matched: LoraMatch, model: Any, family: str | None) -> None:
    """Raise ValueError for a LoRA that is of another family (as far as known), or fits nothing in this model."""
    file = header.path.name
    title = model_title(model)
    if family is not None and family != model_family(model):
        raise ValueError(
            f"{file} is a LoRA for {FAMILIES[family]}, but the model is {title}. "
            f"Load an {FAMILIES[family]} checkpoint, or a LoRA made for {title}."
        )
    if not matched.names:
        raise ValueError(
            f"{file} fits nothing in this {title} model: 0 of its {matched.total} modules match by name and shape. "
            f"Use a LoRA made for {title}; its names here are like {(matched.misfits or ['(none for the model)'])[0]}."
        )


def apply(header: LoraHeader, matched: LoraMatch, model: Any, strength: float) -> Any:
    """A clone of the model with the matching modules patched, each with its alpha.

    Raises ValueError for numbers that are not finite, an alpha that is not one
    number, and what the host cannot load.
    """
    tensors = comfy.utils.load_torch_file(str(header.path), safe_load=True)

    # The host would patch them in, and every picture would be black without a word.
    if broken := not_finite(tensors.items()):
        raise ValueError(
            f"{header.path.name} has numbers that are not finite in {len(broken)} tensors, such as {broken[0]}: every "
            "picture would be black. Get the file again."
        )

    # The host drops the attention projections of PEFT's and diffusers' names, and knows no alpha but a
    # tensor. So every module goes to it under kohya's names, with its alpha beside it. Other kinds, such as
    # LoHa, go as they are.
    modules = header.modules
    alphas = header.alphas()
    lora = {name: tensors[name] for name in header.unmatched}
    for module, name in matched.names.items():
        lora |= _host_tensors(modules[module], name, tensors)
        if module in alphas:
            lora[f"{name}.alpha"] = torch.tensor(alphas[module])

    try:
        patched = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
    except (LookupError, RuntimeError, TypeError, AttributeError) as error:  # of other kinds, such as LoHa, with a gap
        raise ValueError(f"{header.path.name} cannot be loaded by ComfyUI (at {error}). Get it again.") from error
    patched.set_attachments(LOADED, header.path.name)
    return patched


def _host_tensors(module: LoraModule, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's tensors under kohya's suffixes and the host's name of the module."""
    suffix = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    return {f"{name}.{suffix[part]}": tensors[key] for part, key in module.keys.items()}


def prediction_of(model_sampling: Any) -> str:
    """The prediction of the network behind a host `model_sampling`, one of `schedule.PREDICTIONS`."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return "flow"
    return "v_prediction" if isinstance(model_sampling, comfy.model_sampling.V_PREDICTION) else "epsilon"


def recipe_from_settings(
    model: Any, phases: int, mode: str, cfg: float, gamma: float = 1.0, distilled: bool = False
) -> Recipe:
    """A recipe for a file that carries none, on the schedule of the model it is used with.

    gamma: for the mode "stochastic". distilled: whether to sample on the grid of LCM and TCD.
    Raises ValueError when the model is of no family known here, or phases is out of range.
    """
    family = model_family(model)
    if family is None:
        raise ValueError(
            f"No recipe can be made for a {model_title(model)} model; known: {', '.join(FAMILIES.values())}."
        )
    sampling = model.get_model_object("model_sampling")
    prediction = prediction_of(sampling)
    recipe = Recipe(
        family=family,
        objective="unknown",
        mode=mode,
        points=100 if prediction == "flow" else 40,
        phases=phases if mode == "deterministic" else 1,
        steps=phases,
        gamma=0.0 if mode == "deterministic" else gamma,
        sampling_points=DISTILLED_POINTS if distilled else None,
        sampling_from_noise=distilled,
        prediction=prediction,
        shift=sampling.shift if prediction == "flow" else None,
        guidance=cfg,
        guidance_min=min(cfg, 1.0),
        guidance_max=cfg + 1,
    )
    return on_schedule_of(model, recipe)


def on_schedule_of(model: Any, recipe: Recipe) -> Recipe:
    """The recipe with its last level where this model's schedule ends: with zero terminal SNR, or without.

    A recipe is read once, from a file; the model may be another checkpoint, or be patched after the loader.
    """
    if recipe.prediction == "flow":
        return recipe
    last = float(model.get_model_object("model_sampling").sigma_max)
    return replace(recipe, zero_terminal_snr=last > ZERO_TERMINAL_SIGMA)


def is_on_base_schedule(model: Any, recipe: Recipe) -> bool:
    """Whether the model's noisiest level is that of the recipe's base; with AnimateDiff's betas it is another."""
    last = float(model.get_model_object("model_sampling").sigma_max)
    return abs(last / float(recipe.schedule().k_sigma(TICKS)) - 1) < 0.01


def awaits_schedule(model: Any, recipe: Recipe) -> bool:
    """Whether the recipe wants a zero terminal SNR that this model, of another prediction, may get later.

    The host takes a v-prediction checkpoint that carries no mark for one of epsilon, until a
    ModelSamplingDiscrete after the loader says otherwise.
    """
    return recipe.zero_terminal_snr and prediction_of(model.get_model_object("model_sampling")) != recipe.prediction


def moves(model: Any, ticks: tuple[int, ...]) -> bool:
    """Whether the model lacks one of these levels: a ModelSamplingDiscrete (lcm) has left it LCM's 50 alone."""
    points = len(model.get_model_object("model_sampling").sigmas)
    return points == DISTILLED_POINTS and any(tick % (TICKS // points) for tick in ticks)


def shift_of(model: Any) -> float | None:
    """The flow time shift that a host MODEL has now; None for other kinds of model."""
    sampling = model.get_model_object("model_sampling")
    return float(sampling.shift) if prediction_of(sampling) == "flow" else None


def set_shift(model: Any, shift: float | None) -> None:
    """Give a clone of a MODEL this flow shift, as core's ModelSamplingSD3 does.

    Nothing is done where the recipe has none, or the model has it or is no flow model. The recipe's own
    levels are sigmas and need no such thing. It is for what goes by the model: schedulers of the host, gamma,
    and the step ranges of ControlNets and prompts.
    """
    if shift is None or shift_of(model) in (shift, None):
        return
    # A copy, since clones of a MODEL share the object, and setting it would reach those without the LoRA.
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    sampling.set_parameters(shift=shift, multiplier=sampling.multiplier)
    model.add_object_patch("model_sampling", sampling)


def report(
    header: LoraHeader,
    matched: LoraMatch,
    recipe: Recipe,
    strength: float,
    model: Any,
    patched: Any,
    other_loras: list[str],
) -> list[str]:
    """Lines for the loader's node: faults first, then how to sample the LoRA, and the facts of the file.

    model, patched: the host MODEL before and after. other_loras: files of few-step LoRAs that the graph shows
    on the model already, beside one of this node's kind, which the model itself carries (`LOADED`).
    """
    cfg = f"CFG {recipe.guidance:g} ({recipe.guidance_min:g} to {recipe.guidance_max:g})"
    lines = [
        *(_problems(header, matched, recipe, strength, model, other_loras) if strength else [OFF]),
        f"{count_steps(recipe.steps)}, {cfg}, {recipe.mode_text}.",
        f"{FAMILIES[recipe.family]} {recipe.method}, {len(matched.names)} of {matched.total} modules matched.",
        f"Recipe from {SOURCES[recipe.source]}.",
    ]
    if shift_of(patched) != shift_of(model):
        lines.append(f"Shift set to {shift_of(patched):g}, the LoRA's; it was {shift_of(model):g}.")
    if matched.misfits:
        lines.append(f"Without a place here: {matched.misfits[0]}{' and others' * (len(matched.misfits) > 1)}.")
    if matched.text_modules:
        lines.append(f"{matched.text_modules} text encoder modules are not used.")
    if header.unmatched:
        lines.append(f"{len(header.unmatched)} tensors of other kinds left to the host, such as {header.unmatched[0]}.")
    if recipe.source != "header" and len(_without_alpha(header, matched)) == len(matched.names):
        lines.append("The file has no alpha: its weights are taken as they are.")
    return lines


def _problems(
    header: LoraHeader, matched: LoraMatch, recipe: Recipe, strength: float, model: Any, other_loras: list[str]
) -> list[str]:
    """Faults of a LoRA on this model at this strength, a sentence each that says what to do."""
    lines = [TWICE.format(other) for other in [model.get_attachment(LOADED), *other_loras] if other][:1]
    predicted = prediction_of(model.get_model_object("model_sampling"))
    if predicted != recipe.prediction:
        lines.append(OTHER_PREDICTION[recipe.prediction])
    share = strength / recipe.strength
    if recipe.source != "settings" and not USUAL[0] <= share <= USUAL[1]:
        lines.append(f"Made for strength {recipe.strength:g}, not {strength:g}: set strength to {recipe.strength:g}.")
    if matched.misfits:
        lines.append(
            f"{len(matched.misfits)} of {matched.total} modules do not fit this model: take a LoRA made for it."
        )
    without_alpha = len(_without_alpha(header, matched))
    if 0 < without_alpha < len(matched.names):
        lines.append(f"{without_alpha} of {len(matched.names)} modules have lost their alpha: get the file again.")
    return lines


def _without_alpha(header: LoraHeader, matched: LoraMatch) -> list[str]:
    """The matched modules whose alpha is neither a tensor of the file nor in its metadata."""
    modules = header.modules
    alphas = header.scale_alphas()
    return [name for name in matched.names if "alpha" not in modules[name].keys and name not in alphas]
