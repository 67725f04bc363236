"""Whether a VP base (SD1.5, SDXL) predicts eps or v, and whether its schedule ends in pure noise.

A file may say so (`found_in_header`, `found_in_scheduler`), and a user may (`settle` asks both); files are
often wrong or silent, so `check` tries the network on real latents.
"""

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
from .loading import is_hub_id, is_single_file, read_config

# The two kinds as diffusers, ModelSpec, ComfyUI and kohya write them -> as they are called here.
NAMES = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
# Header entries: ModelSpec's for the kind and the one that ComfyUI writes, and kohya's two switches.
KIND_KEY, COMFY_KEY = "modelspec.prediction_type", "modelspec.predict_key"
V_SWITCH, ZERO_SNR_SWITCH = "ss_v_parameterization", "ss_zero_terminal_snr"
# Tensors that ComfyUI detects by name, whatever they hold.
V_TENSOR, ZERO_SNR_TENSOR = "v_pred", "ztsnr"
EDM_TENSORS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
BETA_SCHEDULES = ("scaled_linear", "linear")
# A level, as a share of T, where reading v as eps (or the reverse) is wrong by more than the whole output.
TRIED_LEVEL = 0.7
# Relative errors of a reading above which it is wrong, and below which it is right.
WRONG, RIGHT = 0.8, 0.4


@dataclass(frozen=True)
class Finding:
    """The prediction and the zero terminal SNR that a file names, None where it names none, and where it does."""

    prediction: str | None
    zero_terminal_snr: bool | None
    where: str


def found_in_header(header: LoraHeader) -> Finding:
    """Read a single file: ComfyUI's marker tensors first, then the header. Raises ValueError for an EDM base."""
    name = header.path.name
    metadata = header.metadata
    edm = next((tensor for tensor in EDM_TENSORS if tensor in header.tensors), None)
    if edm:
        raise ValueError(_edm(f"{name} holds a tensor {edm}"))

    prediction, where = None, name
    if V_TENSOR in header.tensors:
        prediction, where = "v_prediction", f"{name} (its tensor {V_TENSOR})"
    elif (kind := metadata.get(KIND_KEY)) in NAMES:
        prediction, where = NAMES[kind], f"{name} ({KIND_KEY} in its header)"
    elif metadata.get(COMFY_KEY) == "v":
        # its "epsilon" says nothing: ComfyUI also writes it where a node has set v-prediction
        prediction, where = "v_prediction", f"{name} ({COMFY_KEY} in its header)"
    elif metadata.get(V_SWITCH) == "True":
        prediction, where = "v_prediction", f"{name} ({V_SWITCH} in its header)"

    zero_snr = ZERO_SNR_TENSOR in header.tensors or metadata.get(ZERO_SNR_SWITCH) == "True"
    return Finding(prediction, zero_snr or None, where)


def found_in_scheduler(path: Path) -> tuple[dict, Finding]:
    """Read a scheduler config: its betas (for `VPSchedule.from_betas`), and the kind that it names.

    Raises ValueError for another kind of schedule than SD1.5's and SDXL's.
    """
    config = read_config(path)
    kind = str(config.get("_class_name", "no name"))
    prediction = str(config.get("prediction_type", "epsilon"))
    if kind.startswith("EDM"):
        raise ValueError(_edm(f"{path} is an {kind}"))
    if "beta_start" not in config or config.get("trained_betas") or prediction not in NAMES:
        raise ValueError(
            f"{path} ({kind}, predicting {prediction!r}) is no schedule of SD1.5 or SDXL: needed are beta_start, "
            "beta_end and beta_schedule, with epsilon or v_prediction. Use another base, or mend the file."
        )

    first, last = config.get("beta_start"), config.get("beta_end")
    kind, ticks = config.get("beta_schedule"), config.get("num_train_timesteps")
    numbers = all(isinstance(beta, float) and 0 < beta < 1 for beta in (first, last))
    if ticks != TICKS or kind not in BETA_SCHEDULES or not numbers:
        settings = f"num_train_timesteps {ticks!r:.30}, beta_schedule {kind!r:.30}, betas {first!r:.30} to {last!r:.30}"
        raise ValueError(
            f"{path} has {settings}; expected {TICKS}, {' or '.join(BETA_SCHEDULES)}, and numbers between 0 and 1. Use "
            "another base, or mend the file."
        )
    finding = Finding(NAMES[prediction], bool(config.get("rescale_betas_zero_snr", False)), str(path))
    return {"beta_start": first, "beta_end": last, "kind": kind, "ticks": TICKS}, finding  # 1000.0 is 1000


def _edm(mark: str) -> str:
    """The error for an EDM base. mark: a clause on what tells that it is one."""
    return f"{mark}: it is an EDM base (CosXL, Playground 2.5), whose noise levels are not supported. Use another base."


def settle(
    finding: Finding, default: Finding, prediction: str | None, zero_terminal_snr: bool | None
) -> tuple[str, bool]:
    """Prediction and zero terminal SNR of a base: as the user set them, else as found in the file, else the default's.

    default: the scheduler config's. prediction, zero_terminal_snr: base.prediction, base.zero_terminal_snr.
    Raises ValueError where what is set contradicts a mark of v-prediction or zero terminal SNR, or where the
    two cannot go together. "epsilon" binds nobody: it is what converters write when they know no better, and
    `check` tries it.
    """
    named = finding.prediction or default.prediction
    settled = prediction or named
    if settled not in ("epsilon", "v_prediction"):
        raise ValueError(f"base.prediction is {settled!r}; SD1.5 and SDXL have 'epsilon' and 'v_prediction'.")
    if finding.prediction == "v_prediction" != settled:
        raise ValueError(
            f"{finding.where} says that the base predicts v_prediction, base.prediction says {settled}. Leave "
            "base.prediction out, or set base.prediction=v_prediction."
        )
    if finding.zero_terminal_snr and zero_terminal_snr is False:
        raise ValueError(
            f"{finding.where} says that the base has zero terminal SNR, base.zero_terminal_snr says that it has not. "
            "Leave base.zero_terminal_snr out."
        )
    zero_snr = finding.zero_terminal_snr if zero_terminal_snr is None else zero_terminal_snr
    zero_snr = bool(default.zero_terminal_snr if zero_snr is None else zero_snr)
    if zero_snr and settled == "epsilon":
        raise ValueError(
            "Zero terminal SNR needs v-prediction: at its last level nothing but noise is left, which says nothing of "
            "the picture. Set base.prediction=v_prediction, or base.zero_terminal_snr=false."
        )
    return settled, zero_snr


@torch.no_grad()
def check(base, x0: Tensor, condition: dict[str, Tensor]) -> None:
    """Raise ValueError where the network's outputs on real latents say that it predicts the other of eps and v.

    x0: (B, C, h, w) scaled latents, with their condition. The error of each reading is taken relative to its
    own target, so that a network that predicts neither (random weights) has about 1 or more in both and
    passes.
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
    named = base.prediction
    (other,) = errors.keys() - {named}
    if errors[named] > WRONG and errors[other] < RIGHT:
        raise ValueError(
            f"{base.path} predicts {other}, not {named}: at level {tick.item()} of {base.schedule.ticks} its output is "
            f"off by {errors[named]:.0%} as {named} and by {errors[other]:.0%} as {other}. {_remedy(base.path, other)}"
        )


def _remedy(path: str, right: str) -> str:
    """A sentence on what to do where `right` is the prediction.

    A file's mark of v-prediction binds (`settle`), so that it has to go before eps can be set.
    """
    mark = _named_by(path) if right == "epsilon" else None
    if mark is None or mark.prediction != "v_prediction":
        return f"Set base.prediction={right}."
    if is_single_file(path):
        return f"{mark.where} says otherwise: remove that mark from the file, then set base.prediction={right}."
    return f"{mark.where} says otherwise: set its prediction_type to {right}, in a copy of the base if it is the hub's."


def _named_by(path: str) -> Finding | None:
    """The kind that a base's file names, from the hub's cache if it is the hub's; None where nothing can be read."""
    if is_single_file(path):
        return found_in_header(read_header(path))
    name = "scheduler/scheduler_config.json"
    config = try_to_load_from_cache(path, name) if is_hub_id(path) else (bundled_folder(path) or Path(path)) / name
    return found_in_scheduler(Path(config))[1] if isinstance(config, str | Path) and Path(config).is_file() else None
