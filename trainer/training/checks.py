"""What a run refuses before anything is loaded or cached; its dry run asks the same function."""

from __future__ import annotations

from pathlib import Path

import torch
from packaging import version

from ...samplers import Recipe
from ..config.config import Config
from ..efficiency.blocks import check_compiler
from ..efficiency.memory import recomputed
from ..efficiency.quantize import check_quantizer
from ..families import Base
from ..lora.install import header_of_family, recipe_of
from ..objectives import OBJECTIVES
from ..tiny.digits import NAME as DIGITS


def check_start(config: Config, base: Base) -> Recipe | None:
    """The recipe of the LoRA in `lora.init`, or None for one that has none.

    Of the base it asks name, prediction and schedule, no weights. Raises FileNotFoundError, or ValueError for a LoRA of
    another family, prediction or shift, for a greater rank than the run's, and for one whose jumps end elsewhere.
    """
    header = header_of_family(Path(config.lora.init), base.name)
    recipe, file = recipe_of(header), header.path.name
    rank = max((module.rank for module in header.modules.values()), default=0)
    if rank > config.lora.rank:
        raise ValueError(f"{file} has rank {rank}, more than lora.rank = {config.lora.rank}. Set lora.rank={rank}.")
    if recipe is None:
        return None
    shift = base.schedule.shift if base.prediction == "flow" else None
    if recipe.source == "header" and (recipe.prediction, recipe.shift) != (base.prediction, shift):
        raise ValueError(
            f"{file} was made for a base with {_reading(recipe.prediction, recipe.shift)}, and this one has "
            f"{_reading(base.prediction, shift)}. Use its own base, or set base.prediction or base.shift."
        )
    edges = recipe.grid(trained=True).edges
    if edges != config.grid().edges:
        points = f" and objective.points={recipe.points}" if recipe.source == "header" else ""
        raise ValueError(
            f"{file} jumps to the ticks {_joined(edges)}, and this run to {_joined(config.grid().edges)}: it would "
            f"unlearn them. Set objective.phases={recipe.phases}{points}; the objectives pcm and lcf have phases."
        )
    return recipe


def _joined(ticks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ticks))


def _reading(prediction: str, shift: float | None) -> str:
    return prediction + ("" if shift is None else f", shift {shift:g}")


def check_prepare(config: Config, base: type[Base], device: torch.device, processes: int) -> None:
    """Raise ValueError for what `prepare` cannot do here, before anything is loaded or cached."""
    train, asked = config.train, config.base.quantize
    if base.whole:
        for setting, value in (
            ("base.quantize", asked),
            ("train.offload", train.offload),
            ("train.shard", train.shard),
        ):
            if value:
                raise ValueError(f"{setting} is for a frozen base, and all of {base.title} is trained. Leave it out.")
    if train.shard:
        _check_shard(config, processes)
    if asked:
        check_quantizer(asked)
    if train.compile:
        check_compiler(device)
    recomputed(config, base)


def _check_shard(config: Config, processes: int) -> None:
    others = {"base.quantize": config.base.quantize, "train.offload": config.train.offload}
    others |= {"train.compile": config.train.compile}
    if set_too := [name for name, value in others.items() if value]:
        raise ValueError(f"train.shard does not go with {' or '.join(set_too)}: leave one of them out.")
    if version.parse(torch.__version__).release < (2, 8):
        raise ValueError(f"train.shard needs torch 2.8 or newer, and this is {torch.__version__}.")
    if processes == 1:
        raise ValueError(
            "train.shard=true shares the frozen weights among processes, and there is one. Start several with "
            "accelerate launch, or leave it out."
        )


def check_whole(config: Config) -> None:
    """Raise ValueError for settings that need a teacher or a LoRA, of which such a run has neither."""
    base, objective = Path(config.base.path).name, config.objective
    problems = []
    if objective.needs_teacher or config.adversarial.weight:
        able = [n for n, row in OBJECTIVES.items() if not row.needs_teacher and row.adversarial != "required"]
        what = objective.name if objective.needs_teacher else "the adversarial loss"
        problems.append(
            f"{what} needs a teacher, and {base} starts from nothing: use objective.name=ct (without a teacher: "
            f"{', '.join(able)})."
        )
    if not config.data.has_pictures:
        problems.append(
            f"data.images is not set, and {base} has no teacher that makes pictures of prompts: set "
            f"data.images={DIGITS}, or a folder of pictures with a digit as caption."
        )
    if config.lora.model_fields_set:
        keys = ", ".join(f"lora.{key}" for key in sorted(config.lora.model_fields_set))
        problems.append(f"{keys}: there is no LoRA, {base} is trained whole. Leave it out.")
    if problems:
        raise ValueError("\n".join(problems))
