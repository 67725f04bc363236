"""What a VP base (SD1.5, SDXL) predicts, eps or v, and whether its schedule ends in pure noise: found, told, tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from ...samplers import jump, output_from_x0_eps
from ...samplers.lora_file import LoraHeader, read_header
from ...samplers.schedule import TICKS
from ..tiny.bundled import bundled_folder
from .loading import is_hub_id, read_config

# How files write the two kinds: diffusers, ModelSpec, ComfyUI, kohya.
NAMES = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
# Header keys of the kind, ModelSpec's and what ComfyUI writes, and of kohya's switches.
KIND_KEY, COMFY_KEY = "modelspec.prediction_type", "modelspec.predict_key"
V_SWITCH, ZERO_SNR_SWITCH = "ss_v_parameterization", "ss_zero_terminal_snr"
# Tensors that ComfyUI detects by name, whatever they hold.
V_TENSOR, ZERO_SNR_TENSOR = "v_pred", "ztsnr"
EDM_TENSORS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
BETA_SCHEDULES = ("scaled_linear", "linear")
# Of the levels, one where reading v as eps (or the reverse) is wrong by more than the whole output.
TRIED_LEVEL = 0.7
WRONG, RIGHT = 0.8, 0.4


@dataclass(frozen=True)
class Found:
    """What a file says of itself, None where it says nothing, and where it says so."""

    prediction: str | None
    zero_terminal_snr: bool | None
    where: str


def found_in_header(header: LoraHeader) -> Found:
    """From a single file: ComfyUI's marker tensors, else the header's keys. Raises ValueError for an EDM base."""
    name, metadata = header.path.name, header.metadata
    edm = next((t for t in EDM_TENSORS if t in header.tensors), None)
    if edm:
        raise ValueError(_edm(f"{name} holds a tensor {edm}"))
    prediction, where = None, name
    if V_TENSOR in header.tensors:
        prediction, where = "v_prediction", f"{name} (its tensor {V_TENSOR})"
    elif (said := metadata.get(KIND_KEY)) in NAMES:
        prediction, where = NAMES[said], f"{name} ({KIND_KEY} in its header)"
    elif metadata.get(COMFY_KEY) == "v":
        # its "epsilon" says nothing: ComfyUI also writes it where a node has set v-prediction
        prediction, where = "v_prediction", f"{name} ({COMFY_KEY} in its header)"
    elif metadata.get(V_SWITCH) == "True":
        prediction, where = "v_prediction", f"{name} ({V_SWITCH} in its header)"
    zero_snr = ZERO_SNR_TENSOR in header.tensors or metadata.get(ZERO_SNR_SWITCH) == "True"
    return Found(prediction, zero_snr or None, where)


def found_in_scheduler(path: Path) -> tuple[dict, Found]:
    """A scheduler config's betas (for `VPSchedule.from_betas`), and what it says. Raises ValueError for other kinds."""
    config = read_config(path)
    kind, prediction = (str(config.get(*told)) for told in (("_class_name", "no name"), ("prediction_type", "epsilon")))
    if kind.startswith("EDM"):
        raise ValueError(_edm(f"{path} is an {kind}"))
    if "beta_start" not in config or config.get("trained_betas") or prediction not in NAMES:
        raise ValueError(
            f"{path} ({kind}, predicting {prediction!r}) is no schedule of SD1.5 or SDXL: needed are beta_start, "
            "beta_end and beta_schedule, with epsilon or v_prediction. Use another base, or mend the file."
        )
    first, last, kind, ticks = (
        config.get(k) for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    )
    numbers = all(isinstance(beta, float) and 0 < beta < 1 for beta in (first, last))
    if ticks != TICKS or kind not in BETA_SCHEDULES or not numbers:
        told = f"num_train_timesteps {ticks!r:.30}, beta_schedule {kind!r:.30}, betas {first!r:.30} to {last!r:.30}"
        raise ValueError(
            f"{path} has {told}; expected {TICKS}, {' or '.join(BETA_SCHEDULES)}, and numbers between 0 and 1. Use "
            "another base, or mend the file."
        )
    told = Found(NAMES[prediction], bool(config.get("rescale_betas_zero_snr", False)), str(path))
    return {"beta_start": first, "beta_end": last, "kind": kind, "ticks": ticks}, told


def _edm(what: str) -> str:
    return f"{what}: it is an EDM base (CosXL, Playground 2.5), whose noise levels are not supported. Use another base."


def settle(found: Found, default: Found, prediction: str | None, zero_terminal_snr: bool | None) -> tuple[str, bool]:
    """Prediction and zero terminal SNR: as set, else as found, else the default's.

    Raises ValueError where what is set contradicts a mark of v-prediction or zero terminal SNR, or where the two cannot
    go together. "epsilon" binds nobody: it is what converters write when they know no better, and `check` tries it.
    """
    said = found.prediction or default.prediction
    settled = prediction or said
    if settled not in ("epsilon", "v_prediction"):
        raise ValueError(f"base.prediction is {settled!r}; SD1.5 and SDXL have 'epsilon' and 'v_prediction'.")
    if found.prediction == "v_prediction" != settled:
        raise ValueError(
            f"{found.where} says that the base predicts v_prediction, base.prediction says {settled}. Leave "
            "base.prediction out, or set base.prediction=v_prediction."
        )
    if found.zero_terminal_snr and zero_terminal_snr is False:
        raise ValueError(
            f"{found.where} says that the base has zero terminal SNR, base.zero_terminal_snr says that it has not. "
            "Leave base.zero_terminal_snr out."
        )
    zero_snr = found.zero_terminal_snr if zero_terminal_snr is None else zero_terminal_snr
    zero_snr = bool(default.zero_terminal_snr if zero_snr is None else zero_snr)
    if zero_snr and settled == "epsilon":
        raise ValueError(
            "Zero terminal SNR needs v-prediction: at its last level nothing but noise is left, which says nothing of "
            "the picture. Set base.prediction=v_prediction, or base.zero_terminal_snr=false."
        )
    return settled, zero_snr


@torch.no_grad()
def check(base, x0: Tensor, condition: dict[str, Tensor]) -> None:
    """Raise ValueError where the network predicts the other of eps and v, as its outputs on real latents tell.

    x0: (B, C, h, w) scaled latents, with their condition. The error of each reading is taken relative to its own
    target, so that a network that predicts neither (random weights) has about 1 or more in both and passes.
    """
    tick = torch.tensor([round(TRIED_LEVEL * base.schedule.ticks)], device=x0.device)
    alpha, sigma = base.schedule.alpha(tick), base.schedule.sigma(tick)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    rows = range(len(x0))  # one by one: this must fit beside whatever else is loaded
    points = jump(x0, noise, alpha, sigma)
    outputs = torch.cat(
        [base.denoise(points[i : i + 1], tick, {k: v[i : i + 1] for k, v in condition.items()}) for i in rows]
    )
    if not outputs.isfinite().all():
        raise ValueError(
            f"{base.path} predicts numbers that are not finite at level {tick.item()} of {base.schedule.ticks}, for "
            "latents of its own data. Set base.dtype=fp32 or bf16, or use another copy of the base."
        )
    errors = {}
    for reading in ("epsilon", "v_prediction"):
        target = output_from_x0_eps(x0, noise, alpha, sigma, reading)
        errors[reading] = ((outputs - target).square().mean() / target.square().mean()).item()
    told = base.prediction
    (other,) = errors.keys() - {told}
    if errors[told] > WRONG and errors[other] < RIGHT:
        raise ValueError(
            f"{base.path} predicts {other}, not {told}: at level {tick.item()} of {base.schedule.ticks} its output is "
            f"off by {errors[told]:.0%} as {told} and by {errors[other]:.0%} as {other}. {_remedy(base.path, other)}"
        )


def _remedy(path: str, right: str) -> str:
    """What to do where the other is right; a mark of v-prediction binds, so that it has to go first."""
    mark = _said_of(path) if right == "epsilon" else None
    if mark is None or mark.prediction != "v_prediction":
        return f"Set base.prediction={right}."
    if path.endswith(".safetensors"):
        return f"{mark.where} says otherwise: remove that mark from the file, then set base.prediction={right}."
    return f"{mark.where} says otherwise: set its prediction_type to {right}, in a copy of the base if it is the hub's."


def _said_of(path: str) -> Found | None:
    """What a base says of itself, from the hub's cache if it is the hub's; None where there is nothing to read."""
    if path.endswith(".safetensors"):
        return found_in_header(read_header(path))
    name = "scheduler/scheduler_config.json"
    config = try_to_load_from_cache(path, name) if is_hub_id(path) else (bundled_folder(path) or Path(path)) / name
    return found_in_scheduler(Path(config))[1] if isinstance(config, str | Path) and Path(config).is_file() else None
