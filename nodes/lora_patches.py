"""A LoRA file as the host's patches: which of its modules a MODEL takes, and why it does not take the others.

Names are ours to bring: every module goes to the host with every tensor that it has, under a name that the host maps.
The host builds the patches, and is asked of each whether it fits the weight that it is for; what a layer shows as its
weight counts, since what it stores may be packed (GGUF, NVFP4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

from ..samplers.lora_file import LoraHeader, not_finite
from ..samplers.lora_modules import DTYPES, LoraModule
from ..samplers.lora_names import host_suffix
from .ia3 import IA3
from .lora_on_model import CONFIGS, model_family
from .peft_dora import PEFTDoRA

INPUT = "diffusion_model.input_blocks.0.0.weight"  # the convolution that takes the latent, and a picture or a mask
COMPILED = "_orig_mod"  # in the names of a module that torch.compile has wrapped
# why modules are not taken -> what is said after "{n} of {total} modules"; a node shows some 90 characters of a line
CAUSES = {
    "half": "are half there: get the file again.",
    "integers": "are integers without their scales: get the file in 16 bits.",
    "compiled": "do not reach a compiled model: compile it after this node.",
    "packed": "meet weights packed in an unknown way: load another format of the checkpoint.",
    "cut": "have no place in this smaller cut of the model: take a LoRA made for it.",
    "place": "have no place in this model: take a LoRA made for it.",
    "shape": "are of another shape than this model's: take a LoRA made for it.",
}
NOT_TAKEN = "ComfyUI took {taken} of {made} patches: load the LoRA before what changes this model."
# what the host raises for tensors that do not fit, or hold nothing
FAILURES = (LookupError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError)
ON_NUMBERS = ("oft", "boft")  # kinds of patches of the host that look at their numbers, and not at shapes alone
Target = str | tuple  # a weight's name, or for rows of a fused one (name, (dim, start, length))


@dataclass(frozen=True)
class Place:
    """Where a module goes in a model.

    name: of the module, as the host maps it. target: the host's, of its weight. width: inputs of the first
    convolution where this model has more than the LoRA, as one for inpainting has; else None.
    """

    name: str
    target: Target
    width: int | None = None


@dataclass(frozen=True)
class LoraMatch:
    """Modules of a LoRA by whether a model takes them.

    places: kohya module name -> its place, for the modules that it takes. misfits: kohya name -> the cause, a key of
    `CAUSES`, for those that it does not. text_modules: number of modules of text encoders, which are not patched
    here. ignored: names of tensors of which the host makes nothing either.
    """

    places: dict[str, Place]
    misfits: dict[str, str]
    text_modules: int
    ignored: list[str]

    @property
    def total(self) -> int:
        return len(self.places) + len(self.misfits)

    def sentences(self) -> list[str]:
        """What keeps the misfits out, a sentence for each cause, that of the most modules first."""
        counts = Counter(self.misfits.values()).most_common()
        return [f"{n} of {self.total} modules {CAUSES[cause]}" for cause, n in counts]


class Weights:
    """The weights of a host MODEL, by the names that LoRAs have for them."""

    def __init__(self, model: Any):
        self.model, self.family = model.model, model_family(model)
        self.targets: dict[str, Target] = comfy.lora.model_lora_keys_unet(model.model, {})
        self.stored = model.model.state_dict().keys()

    def shown(self, key: str) -> Tensor | None:
        """A weight as its layer shows it; None where there is none of this name."""
        try:
            return comfy.utils.get_attr(self.model, key) if key in self.stored else None
        except AttributeError:
            return None

    def place(self, name: str, module: LoraModule) -> Place | None:
        """Where a module goes, by kohya's name, SD3's form of it, or the file's own; None where it has no weight.

        The host has names for a middle block even in models that have none.
        """
        # SD3's modules have no lora_unet_ names in the host, but lora_transformer_ ones
        candidates = (name, name.replace("lora_unet_", "lora_transformer_", 1), module.path)
        mapped = next((candidate for candidate in candidates if candidate in self.targets), None)
        if mapped is None:
            return None
        target = self.targets[mapped]
        weight, down = self.shown(key_of(target)), module.shapes.get("down", ())
        if weight is None:
            return None

        # one for inpainting is the plain model with a mask and a picture as further inputs, to which a LoRA of
        # the plain one adds nothing
        wider = key_of(target) == INPUT and len(down) == weight.ndim == 4 and down[1] < weight.shape[1]
        return Place(mapped, target, weight.shape[1] if wider else None)

    def absence(self) -> str:
        """The cause, a key of `CAUSES`, why modules have no place here."""
        if any(COMPILED in key for key in self.stored):
            return "compiled"
        # the host has a smaller cut of a family, such as SSD-1B, as a kind of it
        is_cut = self.family in CONFIGS and type(self.model.model_config) is not CONFIGS[self.family]
        return "cut" if is_cut else "place"

    def takes(self, target: Target, patch: Any) -> bool:
        """Whether the host can apply a patch to a weight: it is asked to, without numbers, on the device `meta`."""
        key, rows = (target, None) if isinstance(target, str) else target[:2]
        if (weight := self.shown(key)) is None:
            return False
        device = "cpu" if getattr(patch, "name", "") in ON_NUMBERS else "meta"
        # the host runs nodes in inference mode, where tensors do not know whether they were written to
        with torch.inference_mode(False), torch.no_grad():
            empty = torch.empty(weight.shape, device=device)
            try:
                comfy.lora.calculate_weight([(1.0, patch, 1.0, rows, None)], empty, key)
            except FAILURES:  # most are logged by the host itself, and change nothing
                return False
            return empty._version > 0


def key_of(target: Target) -> str:
    """The name of the weight that a target is of."""
    return target if isinstance(target, str) else target[0]


def match(header: LoraHeader, model: Any) -> LoraMatch:
    """Match a LoRA's modules with the weights of a host MODEL, by the file's header: none of its weights is read.

    Raises ValueError for a file that holds no LoRA, or an alpha that is not one number.
    """
    weights, numbers = Weights(model), header.numbers
    places: dict[str, Place] = {}
    misfits: dict[str, str] = {}
    for name, module in header.network.items():
        place = weights.place(name, module)
        if module.is_integer or module.lacks:
            misfits[name] = "integers" if module.is_integer else "half"
        elif place is None:
            misfits[name] = weights.absence()
        elif _is_taken(module, place, numbers[name], weights):
            places[name] = place
        else:
            floating = weights.shown(key_of(place.target)).is_floating_point()
            misfits[name] = "shape" if floating else "packed"
    text_modules = len(header.modules) - len(header.network)
    return LoraMatch(places, misfits, text_modules, _ignored(header, weights))


def _is_taken(module: LoraModule, place: Place, numbers: Mapping[str, float], weights: Weights) -> bool:
    tensors = {key: _empty(module, part) for part, key in module.keys.items() if part not in numbers}
    try:
        patches = build(module, place, tensors, numbers)
    except FAILURES:
        return False
    return bool(patches) and all(weights.takes(target, patch) for target, patch in patches.items())


def _empty(module: LoraModule, part: str) -> Tensor:
    """A tensor of a module's shape and type without numbers; zeros where the host looks at them."""
    make = torch.zeros if module.kind == "OFT" else torch.empty
    device = "cpu" if module.kind == "OFT" else "meta"
    return make(module.shapes[part], dtype=DTYPES[module.dtypes[part]], device=device)


def _ignored(header: LoraHeader, weights: Weights) -> list[str]:
    """Tensors of no known kind of which this host makes nothing either; a later one may know more kinds."""
    unknown = header.unmatched
    # alphas are read, and have no numbers there
    tensors = {
        name: torch.ones(()) if name.endswith(".alpha") else torch.empty(header.tensors[name].shape, device="meta")
        for name in unknown
    }
    modules = {name.rpartition(".")[0] for name in unknown}
    targets = {name: target for name, target in weights.targets.items() if name in modules}
    patches = comfy.lora.load_lora(tensors, targets, log_missing=False)
    kept = {name for name, target in targets.items() if target in patches}
    return [name for name in unknown if name.rpartition(".")[0] not in kept]


def build(
    module: LoraModule, place: Place, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> dict[Target, Any]:
    """The host's patches of a module, by their targets. tensors: by their names in the file. numbers: see `renamed`."""
    if module.kind == "IA3":
        return {place.target: IA3(set(), (tensors[module.keys["ia3"]], bool(numbers["on_input"])))}
    patches = comfy.lora.load_lora(
        renamed(module, place, tensors, numbers), {place.name: place.target}, log_missing=False
    )
    if "magnitude" in module.keys and "dora_scale" not in module.keys and place.target in patches:
        magnitude = tensors[module.keys["magnitude"]]
        patches[place.target] = PEFTDoRA(set(), (patches[place.target], magnitude))
    return patches


def renamed(
    module: LoraModule, place: Place, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> dict[str, Tensor]:
    """All tensors of a module under the host's names, and in the forms that it knows; without PEFT's magnitudes.

    tensors: by their names in the file. numbers: the parts of the module that are one number, as by
    `LoraHeader.numbers`: the alpha may be in the header alone, which the host does not read.
    """
    parts = {part: tensors[key] for part, key in module.keys.items() if part not in numbers}
    parts |= {part: torch.tensor(number) for part, number in numbers.items()}
    if place.width is not None:
        more = place.width - parts["down"].shape[1]
        parts["down"] = torch.nn.functional.pad(parts["down"], (0, 0, 0, 0, 0, more))
    if "bias" in parts:  # PEFT scales it as it scales the product, and the host adds it as it is
        parts["bias"] = parts["bias"] * (numbers.get("alpha", module.rank) / module.rank)
    parts.pop("magnitude", None)
    return {f"{place.name}.{host_suffix(part)}": tensor for part, tensor in parts.items()}


def apply(header: LoraHeader, matched: LoraMatch, model: Any, strength: float) -> tuple[Any, list[str]]:
    """A clone of the model with the LoRA's patches at this strength; and a sentence where it did not take them all.

    Raises ValueError for numbers that are not finite, and what the host cannot load.
    """
    tensors = comfy.utils.load_torch_file(str(header.path), safe_load=True)

    # The host would patch them in, and every picture would be black without a word.
    if broken := not_finite(tensors.items()):
        raise ValueError(
            f"{header.path.name} has numbers that are not finite in {len(broken)} tensors, such as {broken[0]}: every "
            "picture would be black. Get the file again."
        )

    numbers, modules = header.numbers, header.modules
    patches: dict[Target, Any] = {}
    for name, place in matched.places.items():
        patches |= build(modules[name], place, tensors, numbers[name])
    unknown = {name: tensors[name] for name in header.unmatched if name not in matched.ignored}
    try:
        patches |= comfy.lora.load_lora(unknown, Weights(model).targets) if unknown else {}
    except FAILURES as error:  # of a kind with a gap
        raise ValueError(f"{header.path.name} cannot be loaded by ComfyUI (at {error}). Get it again.") from error

    patched = model.clone()
    taken = patched.add_patches(patches, strength)
    refused = [NOT_TAKEN.format(taken=len(taken), made=len(patches))] if len(taken) < len(patches) else []
    return patched, refused
