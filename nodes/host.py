"""The host as every node needs it, with the differences between its versions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import comfy.model_sampling
import comfy.sample
from comfy_api.latest import io
from server import PromptServer

import nodes as core  # the host's nodes: packs are imported by path, so this name is not this folder's

from ..samplers import FlowSchedule, Schedule, VPSchedule
from ..samplers.schedule import RatioFlowSchedule

T = TypeVar("T")
RecipeType = io.Custom("PCM_RECIPE")
WARNING = "⚠ "  # before a line that says what is wrong


def supported(make: Callable[..., T], *args: Any, **keywords: Any) -> T:
    """Call `make` without the keywords this host does not know (0.3.64: no search aliases, no advanced inputs)."""
    parameters = inspect.signature(make).parameters
    return make(*args, **{name: value for name, value in keywords.items() if name in parameters})


def menu_of(core_node: str) -> str:
    """The menu that a core node is in; newer hosts have moved them."""
    return core.NODE_CLASS_MAPPINGS[core_node].CATEGORY


def speaking(**keywords: Any) -> io.Schema:
    """The schema of a node that writes lines on itself (`show`).

    The host gives it its id and the graph; newer hosts repeat the lines when the node's result is cached. Two equal
    nodes are two: else the host would run one of them, and the other would say nothing.
    """
    hidden = [io.Hidden.unique_id, io.Hidden.prompt]
    return supported(io.Schema, hidden=hidden, has_intermediate_output=True, not_idempotent=True, **keywords)


def warned(sentences: Iterable[str]) -> list[str]:
    """Lines for `show` that say what is wrong."""
    return [WARNING + sentence for sentence in sentences]


def show(
    node: type[io.ComfyNode], lines: list[str], later: list[tuple[str, list[str]]] | None = None
) -> dict[str, tuple]:
    """Write lines on a node as it stands in the graph, those of `warned` first; the result is for the node's `ui`.

    A node of ordinary size shows two lines of about 40 characters: the most important first, and short. Every line is a
    sentence, since some frontends run them together.

    later: pairs of a prompt's id and warnings that are known only when its samplers run, after the node has been
    executed. The host keeps this very list in its cache and its history, so what is put in later is there too. It is no
    dictionary, since the host counts each of those among a node's results as a file that the prompt has made.
    """
    text = "\n".join(sorted(lines, key=lambda line: not line.startswith(WARNING)))
    # To the browser that has queued the graph alone: in another one this id may be another node's.
    if client := PromptServer.instance.client_id:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id, client)
    return {"text": (text,)} | ({} if later is None else {"warnings": (later,)})


def flow_shift(model_sampling: Any) -> float:
    """The linear time shift of a host's flow `model_sampling`: some have mu in its place, of which it is exp(mu), and
    some have none, which is 1."""
    shift = float(getattr(model_sampling, "shift", 1.0))
    return math.exp(shift) if isinstance(model_sampling, comfy.model_sampling.ModelSamplingFlux) else shift


def schedule_of(model_sampling: Any) -> Schedule:
    """The noise schedule of the model that is running, from the host's `model_sampling`."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return FlowSchedule(flow_shift(model_sampling))
    if isinstance(model_sampling, comfy.model_sampling.COSMOS_RFLOW):
        return RatioFlowSchedule(flow_shift(model_sampling), float(model_sampling.sigma_max))
    return VPSchedule.from_k_sigmas(model_sampling.sigmas)


def fit_to_model(model: Any, latent: dict[str, Any]) -> dict[str, Any]:
    """A copy of the latent whose samples, where empty, have the channels and size that this model works on."""
    latent = latent.copy()
    ratios = [latent.pop(f"downscale_ratio_{axis}", None) for axis in ("spacial", "temporal")]

    # Older hosts take fewer of them: all parameters but the model and the samples are ratios.
    ratio_count = len(inspect.signature(comfy.sample.fix_empty_latent_channels).parameters) - 2
    latent["samples"] = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios[:ratio_count])
    return latent
