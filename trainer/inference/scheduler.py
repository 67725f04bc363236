"""`PCMScheduler`: any few-step LoRA in diffusers' pipelines, at the levels and with the steps of its recipe.

    pipe.load_lora_weights("pcm.safetensors")
    pipe.scheduler = PCMScheduler.from_lora("pcm.safetensors", pipe.scheduler)
    pipe(prompt, num_inference_steps=4, guidance_scale=1)

Latents between steps are in the convention of the samplers here, and of `EulerDiscreteScheduler`: x / alpha for VP
models, x itself for flow models. A step is `sample_phased` for one step, so that there is no second idea of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...samplers import FlowSchedule, LevelPlan, Recipe, VPSchedule, sample_phased, seeded_noise, x0_eps_from_output
from ...samplers.editing import noised
from ...samplers.lora_file import read_header
from ...samplers.lora_info import recipe_of
from ...samplers.sampling import NoiseSampler
from ...samplers.schedule import TICKS, Schedule

if TYPE_CHECKING:
    Init = TypeVar("Init", bound=Callable[..., None])

    # diffusers' own has no types, and a class whose __init__ it decorates would be Any to whoever checks types
    def register_to_config(init: Init) -> Init: ...
else:
    from diffusers.configuration_utils import register_to_config

# what a network predicts, as diffusers' configs have it -> as recipes do
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "flow_prediction": "flow"}
UNLIKE = ("EDM", "DPMSolverSDE")  # schedulers for another noise, and one with a library of its own
OF_BASE = ("prediction", "shift", "zero_terminal_snr")  # fields of a recipe that stand in the config by themselves
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
FLOW = "FlowMatch"  # how the names of diffusers' flow schedulers begin

logger = getLogger(__name__)


@dataclass
class PCMSchedulerOutput(BaseOutput):
    """What a step gives: the latents for the next step, and the step's x0, both (B, C, h, w)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class PCMScheduler(SchedulerMixin, ConfigMixin):
    """Samples few-step LoRAs (PCM, LCM, TCD, Hyper-SD, Lightning, DMD2, Flash, Turbo) as their recipes say.

    Args:
        num_train_timesteps: 1000, on which all grids stand.
        beta_start, beta_end, beta_schedule: the VP schedule of the base: "scaled_linear" or "linear".
        trained_betas: None; other schedules have no recipe.
        prediction_type: what the base predicts: "epsilon", "v_prediction" or "flow_prediction".
        rescale_betas_zero_snr: whether its schedule ends in pure noise.
        shift: time shift of a flow model; of no effect on others.
        recipe: the other fields of a `Recipe`; None for PCM in 4 steps. `from_lora` and `from_recipe` write it.

    Raises ValueError for settings that no recipe can have.
    """

    order = 1
    _compatibles = [
        *(scheduler.name for scheduler in KarrasDiffusionSchedulers if not scheduler.name.startswith(UNLIKE)),
        "LCMScheduler",
        "TCDScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = TICKS,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        shift: float = 3.0,
        recipe: dict[str, Any] | None = None,
    ):
        if num_train_timesteps != TICKS or trained_betas is not None:
            betas = "" if trained_betas is None else ", and trained_betas are given"
            raise ValueError(
                f"num_train_timesteps is {num_train_timesteps}{betas}; few-step LoRAs of SD1.5, SDXL and SD3 stand on "
                f"{TICKS} timesteps, by beta_start, beta_end and beta_schedule or by a shift."
            )
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type is {prediction_type!r}; available: {', '.join(PREDICTIONS)}.")
        flow = prediction_type == "flow_prediction"
        self.recipe = _recipe_with(
            {"family": "sd3" if flow else "sd15"} | dict(recipe or {}),
            prediction=PREDICTIONS[prediction_type],
            shift=shift if flow else None,
            zero_terminal_snr=rescale_betas_zero_snr,
        )
        self.schedule: Schedule = (
            FlowSchedule(shift)
            if flow
            else VPSchedule.from_betas(beta_start, beta_end, beta_schedule, zero_terminal_snr=rescale_betas_zero_snr)
        )

        # Pure noise at the noisiest level, as the host and `pcm sample` start from it.
        self.init_noise_sigma = self.schedule.k_scale(self.schedule.k_sigma(TICKS)).reciprocal().item()
        self.num_inference_steps: int | None = None
        self._noise_seed: int | None = None
        self._is_scaled = False
        self._set_levels(tuple(range(TICKS, -1, -1)), None)

    @classmethod
    def from_lora(cls, file: str | Path, replaced: SchedulerMixin | None = None, **changes: Any) -> PCMScheduler:
        """The scheduler for a LoRA: by the recipe in its header, or by its name where it is a known file.

        replaced, changes: as in `from_recipe`. Raises ValueError where nothing says how to sample it, and what reading
        the file raises.
        """
        recipe = recipe_of(read_header(Path(file)))
        if recipe is None:
            raise ValueError(
                f"{Path(file).name} has no recipe in its header, and is no known file by its name. Give it its "
                "published name, write a recipe into it (pcm tag), or say how it is sampled: PCMScheduler.from_recipe("
                "Recipe(family=..., ...))."
            )
        return cls.from_recipe(recipe, replaced, **changes)

    @classmethod
    def from_recipe(cls, recipe: Recipe, replaced: SchedulerMixin | None = None, **changes: Any) -> PCMScheduler:
        """The scheduler for a recipe.

        replaced: the pipeline's own scheduler, whose betas it takes, and with which it has to agree on what the network
            predicts. None: the usual betas, and the recipe is believed.
        changes: fields of the recipe to set otherwise, such as gamma=0.2.
        Raises ValueError where the two do not agree, and for changes that no recipe can have.
        """
        recipe = replace(recipe, **_known_fields(changes))
        settings: dict[str, Any] = {}
        zero_terminal_snr = recipe.zero_terminal_snr
        if replaced is not None:
            _check_agreement(recipe, replaced)
            settings = {key: value for key, value in replaced.config.items() if key in BETAS}
            zero_terminal_snr |= bool(replaced.config.get("rescale_betas_zero_snr"))
        if recipe.shift is not None:
            settings["shift"] = recipe.shift
        return cls(
            **settings,
            prediction_type=next(name for name, ours in PREDICTIONS.items() if ours == recipe.prediction),
            rescale_betas_zero_snr=zero_terminal_snr,
            recipe={key: value for key, value in asdict(recipe).items() if key not in OF_BASE},
        )

    # --- levels

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set the levels of a run, and start anew.

        num_inference_steps: None is the recipe's.
        strength: where below 1, the levels begin at the trained level that is nearest to this share of the noise, as in
            the nodes. diffusers' own pipelines for image to image do not hand theirs on: see `snapped_strength`.
        Raises ValueError for a number of steps or a strength that there are no levels for.
        """
        steps = self.recipe.steps if num_inference_steps is None else num_inference_steps
        plan = self._plan(steps, strength)
        for note in [*self.recipe.step_warnings(steps), *plan.notes]:
            logger.warning(note)
        self.num_inference_steps = plan.steps
        self._set_levels(plan.ticks, device)

    def snapped_strength(self, strength: float, num_inference_steps: int | None = None) -> float:
        """The strength for a pipeline, so that it begins at the trained level nearest to `strength`, as the nodes do.

        A pipeline for image to image goes without the first steps of as many as its strength leaves out, rounded its
        own way, and so may start where the LoRA was not trained to.
        """
        steps = self.recipe.steps if num_inference_steps is None else num_inference_steps
        levels = self._plan(steps).ticks[:-1]
        start = self._plan(steps, strength).ticks[0]
        taken = steps - min(range(steps), key=lambda i: abs(levels[i] - start))
        share = taken / steps

        # SD1.5's and SDXL's round the steps that they take down, SD3's those that they leave out.
        if self.recipe.prediction == "flow":
            return share if int(steps - steps * share) == steps - taken else math.nextafter(share, 0)
        return share if int(steps * share) == taken else math.nextafter(share, 1)

    def _plan(self, steps: int, strength: float = 1.0) -> LevelPlan:
        try:
            return self.recipe.grid().plan(steps, strength)
        except ValueError as error:
            raise ValueError(f"{error} This LoRA is for num_inference_steps={self.recipe.steps}.") from None

    def _set_levels(self, ticks: tuple[int, ...], device: str | torch.device | None) -> None:
        """Levels from the first to the clean end; the tables stay on the CPU, where no step waits for them."""
        self._ticks = torch.tensor(ticks)
        self.sigmas = self.schedule.k_sigma(self._ticks)
        times = self.schedule.network_time(self._ticks[:-1])
        self.timesteps = (times if self.recipe.prediction == "flow" else times.long()).to(device)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._noise: NoiseSampler | None = None

    @property
    def step_index(self) -> int | None:
        """The place of the next step among the timesteps; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The place of the first step, where a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this place among the timesteps, as pipelines for image to image do."""
        self._begin_index = begin_index
        start = self._ticks[begin_index].item() if 0 < begin_index < len(self.timesteps) else TICKS
        if start == TICKS or self.num_inference_steps is None:
            return
        trained = self._plan(self.num_inference_steps, start / TICKS).ticks[0]
        if trained != start:
            share = self.snapped_strength(start / TICKS, self.num_inference_steps)
            logger.warning(
                f"This strength starts at {start / TICKS:g} of the noise, between the levels that the LoRA was trained "
                f"to start from; the nearest is {trained / TICKS:g}. Pass strength={share:g}, or what "
                "scheduler.snapped_strength says."
            )

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep among those of this run; ValueError where it is none of them."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        places = (timesteps == torch.as_tensor(timestep).to(timesteps.device)).nonzero()
        if len(places):
            return places[0].item()
        raise ValueError(
            f"{float(timestep):g} is none of this run's timesteps, {', '.join(f'{t:g}' for t in timesteps.tolist())}. "
            "Call set_timesteps first, and take the timesteps from scheduler.timesteps."
        )

    def _begin(self, timestep: float | Tensor) -> int:
        """The place of the step that is due."""
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        return self._step_index

    # --- a run

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents as the network takes them: over sqrt(1 + sigma^2) for VP models, as they are for flow models."""
        self._is_scaled = True
        if self.recipe.prediction == "flow":
            return sample
        return self._point(sample, self.sigmas[self._begin(timestep)]).to(sample.dtype)

    def _point(self, sample: Tensor, sigma: Tensor) -> Tensor:
        """Latents of the samplers' convention in the network's, in fp32."""
        return sample.float() * self.schedule.k_scale(sigma).to(sample.device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PCMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the latents to the next level: the phase jump, and what the recipe has of fresh noise.

        model_output, sample: (B, C, h, w); the sample as the step before has left it, not as the network took it.
        generator: draws the fresh noise, unless `set_noise_seed` was called. All is computed in fp32 and handed back
        in the network's dtype.
        Raises ValueError without timesteps, for a timestep that is none of them, and after the last.
        """
        if self.num_inference_steps is None:
            raise ValueError("There are no timesteps yet: call set_timesteps after creating the scheduler.")
        place = self._begin(timestep)
        if place >= len(self.timesteps):
            raise ValueError(f"The run of {len(self.timesteps)} steps has ended: call set_timesteps for another one.")
        if not self._is_scaled and self.recipe.prediction != "flow":
            self._is_scaled = True  # said once
            logger.warning("The network's input was not scaled by scale_model_input: the picture will be wrong.")

        tick, sigmas = self._ticks[place], self.sigmas[place : place + 2]
        alpha, sigma = self.schedule.alpha(tick), self.schedule.sigma(tick)
        point = self._point(sample, sigmas[0])
        x0, _ = x0_eps_from_output(model_output, point, alpha, sigma, self.recipe.prediction)

        reports: list[dict[str, Any]] = []
        after = sample_phased(
            lambda x, sigma: x0,
            sample,
            sigmas,
            callback=reports.append,
            schedule=self.schedule,
            gamma=self.recipe.gamma,
            min_alpha=self.recipe.min_alpha,
            noise_sampler=self._noise_for(sample, generator),
        )
        self._step_index = place + 1

        results = (after.to(model_output.dtype), reports[0]["denoised"].to(model_output.dtype))
        return PCMSchedulerOutput(*results) if return_dict else results

    def set_noise_seed(self, seed: int | None) -> None:
        """Draw the fresh noise from this seed, each picture's by itself, as the nodes and `pcm sample` do.

        Without it a step draws from its generator, as diffusers' schedulers do; the pipeline for SD3 hands none on.
        None: the generator again.
        """
        self._noise_seed, self._noise = seed, None

    def _noise_for(self, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> NoiseSampler:
        if self._noise_seed is None:
            return lambda *_: randn_tensor(sample.shape, generator, sample.device, torch.float32)
        if self._noise is None:
            self._noise = seeded_noise(sample, self._noise_seed)
        return self._noise

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) with noise at the levels of these timesteps, (B,) or (1,)."""
        sigmas = self._levels_of(timesteps).expand(len(original_samples))
        rows = zip(original_samples.float().split(1), noise.float().split(1), sigmas, strict=True)
        noisy = [noised(latents, drawn, sigma, self.schedule) for latents, drawn, sigma in rows]
        return torch.cat(noisy).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by the name that flow schedulers have for it."""
        return self.add_noise(sample, noise, timestep)

    def _levels_of(self, timesteps: Tensor) -> Tensor:
        """The levels (B,) of timesteps, in the samplers' convention; those of this run to their last bit."""
        timesteps = torch.as_tensor(timesteps).flatten().cpu()
        if self.recipe.prediction != "flow":
            return self.schedule.k_sigma(timesteps + 1)
        sigmas, table = timesteps.float() / TICKS, self.timesteps.cpu()
        nearest = (table[None] - timesteps[:, None]).abs().argmin(dim=1)
        return torch.where(table[nearest] == timesteps, self.sigmas[nearest], sigmas)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _recipe_with(settings: dict[str, Any], **base: Any) -> Recipe:
    """The recipe of a config, which may be of a later version; base: the fields that stand there by themselves."""
    names = {field.name for field in fields(Recipe)}
    return Recipe(**{key: value for key, value in settings.items() if key in names} | base)


def _known_fields(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes to a recipe; ValueError for names that it has not."""
    names = {field.name for field in fields(Recipe)}
    if unknown := changes.keys() - names:
        raise ValueError(f"A recipe has no {', '.join(sorted(unknown))}; available: {', '.join(sorted(names))}.")
    return changes


def _check_agreement(recipe: Recipe, replaced: SchedulerMixin) -> None:
    """Raise ValueError where a pipeline's scheduler is for a network that predicts another thing than the recipe's."""
    kind = type(replaced).__name__
    if kind.startswith("EDM"):
        raise ValueError(f"The pipeline's scheduler is {kind}: no few-step LoRA here is for an EDM model.")
    usual = "flow_prediction" if kind.startswith(FLOW) else "epsilon"
    prediction = replaced.config.get("prediction_type", usual)
    if PREDICTIONS.get(prediction) != recipe.prediction:
        raise ValueError(
            f"This LoRA was made for a base that predicts {recipe.prediction}; by the pipeline's scheduler ({kind}) "
            f"its network predicts {prediction}. Use the LoRA with a base like its own, or leave the scheduler out "
            "where it is wrong."
        )
