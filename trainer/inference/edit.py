"""Zero-shot editing on a diffusers base: the loop of samplers/editing.py, for `pcm edit` and the gallery of docs/."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from ...samplers import LevelPlan, Recipe, seeded_noise
from ...samplers.editing import (
    CELL,
    PROJECTIONS,
    Codec,
    Projected,
    ProjectedLatent,
    begin,
    canvas,
    denoising,
    estimated_noise,
    finish,
    slerp,
    slerped,
    stroke_plan,
)
from ...samplers.operators import Colorize, Identity, Inpaint, Operator, SuperResolution, luminance
from ...samplers.sampling import Projection
from ..families import Base, Condition
from ..families.base import Alone
from ..families.generate import draw, unit_noise
from ..families.loading import load_part
from ..lora.install import install_for_sample, null_of

STEPS_ALONE = 8


class Edited(NamedTuple):
    """image: (B, 3 or 4, H, W) in [0, 1]; latents: what it was decoded from; plan: the levels that were sampled."""

    image: Tensor
    latents: Tensor
    plan: LevelPlan


class BaseCodec:
    """A base's VAE, between pictures in [0, 1] and latents in the network's units.

    It is moved to the network's device and stays there: a loop needs it at every step.
    """

    def __init__(self, base: Base):
        base.vae.to(base.device)
        self.base = base

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.base.encode_images(2 * row - 1)[0] for row in pixels.split(1)])

    def decode(self, latents: Tensor) -> Tensor:
        return self.base.decode(latents)


@dataclass
class Editor:
    """A base as it stands, with or without a LoRA in it, and how it is sampled.

    usual: the LoRA's recipe, or how the base is sampled alone; guidance, gamma, steps: None is what it says.
    null: what guidance subtracts. every, residual: see `Projected`. projection: "picture" (through the VAE), "latent"
    (inpainting and outpainting alone) or "none" (only the result is projected, as a baseline). fast: a cheaper VAE for
    the steps' projections; the start and the result go through the base's own. notes: sentences on the LoRA.
    """

    base: Base
    usual: Recipe | Alone
    null: Condition
    steps: int | None = None
    guidance: float | None = None
    gamma: float | None = None
    projection: str = "picture"
    every: int = 1
    residual: bool = True
    fast: Codec | None = None
    notes: tuple[str, ...] = ()
    codec: Codec = field(init=False)

    def __post_init__(self):
        if self.base.vae is None:
            raise ValueError(f"{self.base.path} draws without a VAE. Edits need a base of SD1.5, SDXL or SD3.")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection is {self.projection!r}; available: {', '.join(PROJECTIONS)}.")
        self.usual.grid().plan(self._steps)  # a number of steps that it has not is an error before any work
        self.codec = BaseCodec(self.base)

    @property
    def multiple(self) -> int:
        """Pixels that a side must be a multiple of: a latent cell, or a transformer's patch of them."""
        return CELL * getattr(self.base.network.config, "patch_size", 1)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError for a result beyond what the network's position embeddings, if any, can tell apart."""
        sides = canvas(size, self.multiple)
        largest = getattr(self.base.network.config, "pos_embed_max_size", 0) * self.multiple
        if largest and max(sides) > largest:
            raise ValueError(
                f"The result would be {size[1]}x{size[0]}; {Path(self.base.path).name} draws at most {largest} pixels "
                "a side. Make the picture smaller first."
            )

    @property
    def recipe(self) -> Recipe | None:
        """The LoRA's, if there is one."""
        return self.usual if isinstance(self.usual, Recipe) else None

    def settings(self) -> dict[str, Any]:
        """CFG and gamma as they are used, by name."""
        return {
            "guidance": self.usual.guidance if self.guidance is None else self.guidance,
            "gamma": self.usual.gamma if self.gamma is None else self.gamma,
        }

    def warnings(self, plan: LevelPlan) -> list[str]:
        """What is wrong with the settings, and how the levels differ from what was asked for: a sentence for each."""
        warnings = [*self.notes]
        if self.recipe:
            warnings += self.recipe.warnings(self._steps, self.settings()["guidance"])
        return [*warnings, *plan.notes]

    def edit(self, operator: Operator, condition: Condition, seed: int = 0, denoise: float = 1.0) -> Edited:
        """Inpaint, outpaint, colorize or super-resolve: what the operator knows is kept.

        condition: of one prompt, or of one for each picture. denoise: the strength, on the phases' edges.
        """
        return self._edit(operator, condition, seed, self.usual.grid().plan(self._steps, denoise))

    def stroke(self, picture: Tensor, condition: Condition, seed: int = 0, strength: float = 0.75) -> Edited:
        """Paint after strokes, or vary a picture: noised to the strength's level, and drawn from there."""
        grid = self.usual.grid()
        if self.steps is None and self.recipe:
            plan = stroke_plan(grid, self.base.schedule, strength)
        else:
            plan = grid.plan(self._steps, strength)
        return self._edit(Identity(picture), condition, seed, plan)

    def denoise(self, picture: Tensor, condition: Condition, seed: int = 0, noise: float | None = None) -> Edited:
        """Take white noise of this standard deviation (of pictures in [0, 1]; None: estimated) out of a picture."""
        operator = Identity(picture)
        std = estimated_noise(operator.start) if noise is None else noise
        steps = self.steps if self.recipe else self._steps
        plan, amount = denoising(
            self.codec, operator.start, std, self.usual.grid(), self.base.schedule, steps, seed, self.multiple
        )
        if not plan.steps:
            return Edited(operator.finish(operator.start), begin(operator, self.codec, self.multiple), plan)
        return self._edit(operator, condition, seed, plan, amount)

    def interpolate(
        self, size: tuple[int, int], conditions: tuple[Condition, Condition], seeds: tuple[int, int], frames: int
    ) -> Edited:
        """Frames (frames, 3, H, W) between two prompts and two noises: slerp of the noises, linear in the encodings.

        Each frame is sampled by itself, so the first and the last are the single pictures of their seeds, bit for bit.
        """
        if frames < 2:
            raise ValueError(f"frames is {frames}; at least 2, the two ends.")
        plan = self.usual.grid().plan(self._steps)
        channels = self.base.network.config.in_channels
        shape = (1, channels, *(side // CELL for side in size))
        ends = [unit_noise(shape, seed).to(self.base.device) for seed in seeds]
        latents = []
        for i in range(frames):
            share = i / (frames - 1)
            condition = {k: torch.lerp(v, conditions[1][k], share) for k, v in conditions[0].items()}
            fresh = slerped(*(seeded_noise(ends[0], seed) for seed in seeds), share)
            latents.append(self._sample(condition, slerp(*ends, share), plan, noise_sampler=fresh))
        drawn = torch.cat(latents)
        return Edited(self.codec.decode(drawn), drawn, plan)

    @property
    def _steps(self) -> int:
        if self.steps is not None:
            return self.steps
        return self.recipe.steps if self.recipe else STEPS_ALONE

    def _edit(
        self, operator: Operator, condition: Condition, seed: int, plan: LevelPlan, amount: float = 1.0
    ) -> Edited:
        """Draw from the operator's start along `plan`, and decode. amount: share of the unit noise that is put on the
        start, less where the start brings noise of its own."""
        self.check_size(operator.size)
        start = begin(operator, self.codec, self.multiple)
        noise = amount * unit_noise(start.shape, seed)
        latents = self._sample(
            condition, noise, plan, start=start, project=self._projection(operator, start), seed=seed
        )
        return Edited(finish(operator, self.codec, latents), latents, plan)

    def _projection(self, operator: Operator, start: Tensor) -> Projection | None:
        if self.projection == "none" or isinstance(operator, Identity):
            return None
        if self.projection == "latent":
            return ProjectedLatent.of(operator, start)
        return Projected(operator, self.fast or self.codec, self.every, self.residual)

    @torch.no_grad()
    def _sample(self, condition: Condition, noise: Tensor, plan: LevelPlan, **options) -> Tensor:
        """Latents at the levels of `plan`; options: of `draw`."""
        condition = {k: v.expand(len(noise), *v.shape[1:]) if len(v) == 1 else v for k, v in condition.items()}
        return draw(self.base, self.usual, condition, self.null, noise, plan.ticks, **self.settings(), **options)


def kept_error(operator: Operator, image: Tensor) -> dict[str, float] | None:
    """How far a picture, in 8 bits, is from what the operator knows: greatest and mean difference, in levels of 255.

    None for an operator that knows nothing.
    """
    written = image[:, :3].mul(255).round() / 255
    if isinstance(operator, Inpaint):
        off = (written - operator.known) * (operator.weight == 0)
    elif isinstance(operator, Colorize):
        off = luminance(written) - operator.grey
    elif isinstance(operator, SuperResolution):
        off = F.avg_pool2d(written, operator.factor) - operator.low
    else:
        return None
    return {"max": 255 * off.abs().max().item(), "mean": 255 * off.abs().mean().item()}


def open_editor(
    base: Base,
    lora: Path | None = None,
    strength: float | None = None,
    negative: str | None = None,
    fast_vae: Path | None = None,
    **options,
) -> Editor:
    """An editor with this LoRA at this strength (None: what its recipe wants), and with guidance away from `negative`.

    fast_vae: see `load_fast_vae`. options: of `Editor`.
    """
    recipe, _, notes = install_for_sample(lora, base, strength)
    fast = None if fast_vae is None else load_fast_vae(fast_vae, base)
    return Editor(base, recipe or base.alone, null_of(base, negative), fast=fast, notes=notes, **options)


def load_fast_vae(folder: Path, base: Base) -> BaseCodec:
    """A tiny autoencoder (TAESD, https://github.com/madebyollin/taesd) from its diffusers folder, for this base.

    Raises FileNotFoundError or ValueError where there is none, or one for other latents.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No tiny autoencoder in {folder}: it needs a config.json and weights in .safetensors.")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if kind != "AutoencoderTiny":
        raise ValueError(f"{folder} holds {kind}; the fast VAE must be an AutoencoderTiny, such as TAESD.")
    tiny = load_part(folder.parent, folder.name, AutoencoderTiny, torch.float32)
    channels, wanted = tiny.config.latent_channels, base.network.config.in_channels
    if channels != wanted:
        raise ValueError(
            f"The fast VAE in {folder} has latents of {channels} channels, {Path(base.path).name} of {wanted}. Use the "
            "one that is made for this family."
        )
    return BaseCodec(replace(base, vae=tiny.requires_grad_(False).eval()))
