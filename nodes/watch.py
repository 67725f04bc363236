"""The watch that Load PCM LoRA keeps on the samplers that run its model, the host's own among them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ..samplers import Recipe
from ..samplers.recipe import is_whole, same_shift
from ..samplers.schedule import TICKS
from .frames import pictures_fault, shift_fault
from .graph import Graph, model_path, running_graph
from .guidance import cfg_of, cfg_to_judge
from .host import show, warned
from .lora_on_model import (
    MOVED,
    is_on_base_schedule,
    model_family,
    moves,
    on_schedule_of,
    pixels_of,
    recipe_seen,
    sampling_fault,
    shift_of,
    size_fault,
)
from .loras_in_graph import TWICE, few_step_loras
from .sampling import is_empty, options_of

KEY = "pcm_watch"
MOST_PROMPTS = 50  # whose misfits are kept
SUITED = {0.0: ("euler",), 1.0: ("lcm", "euler_ancestral")}  # gamma -> core's samplers that do so, or nearly


class Watch:
    """Looks at each run of a model, and has the loader say what does not fit the LoRA. It changes nothing.

    It speaks of runs alone: a sampler whose result is cached is not looked at again, and what was said of its last run
    stands.

    node: the loader, as it was executed. recipe: its LoRA's. report: lines that the loader has in any case.
    misfits: pairs of a prompt's id and what was said of it: the `later` of `host.show`.
    """

    def __init__(self, node: type[io.ComfyNode], recipe: Recipe, report: list[str]):
        self.node = node
        self.recipe = recipe
        self.report = report
        self.misfits: list[tuple[str, list[str]]] = []

    def put_on(self, model: Any) -> None:
        """Watch a clone of a host MODEL, in place of another watch that may be on it.

        OUTER_SAMPLE is the wrapper that every guider calls once a run, with the sampler and its sigmas as they
        are. With two loaders the last is in charge, since the model is then sampled by its recipe.
        """
        model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self)

    def __call__(
        self,
        executor: Callable[..., Tensor],
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """Sample, as an OUTER_SAMPLE wrapper of the host; other packs' wrappers may call it by its keywords."""
        try:
            self._look(executor.class_obj, latent_image, sampler, sigmas)
        except Exception:  # of a guider, sampler or schedule of another pack: the run must be able to go on
            logging.warning("A PCM node cannot tell whether this run suits its recipe.", exc_info=True)
        return executor(noise, latent_image, sampler, sigmas, *rest, **more)

    def _look(self, guider: Any, latent: Tensor, sampler: Any, sigmas: Tensor) -> None:
        """Judge a run, and write what does not fit it on the loader."""
        context = get_executing_context()
        prompt_id, sampler_id = (context.prompt_id, context.node_id) if context else ("", "")
        said = self._of_prompt(prompt_id)
        graph = running_graph(prompt_id)
        path = model_path(graph, sampler_id)
        faults = misfits(self.recipe, guider, latent, sampler, sigmas, path)
        if not is_judged(sampler):
            faults = [*self._later_lora(graph, path), *faults]
        said += [line for line in faults if line not in said]
        show(self.node, list(dict.fromkeys([*warned(said), *self.report])))

    def _later_lora(self, graph: Graph | None, path: list[dict[str, Any]]) -> list[str]:
        """The sentence on another few-step LoRA that the graph has put on the model after this node, if any.

        path: the sampler's `graph.model_path`.
        """
        entry = (graph or {}).get(self.node.hidden.unique_id)
        later = list(takewhile(lambda each: each is not entry, path))
        return [TWICE.format(name) for name in few_step_loras(later)[:1]] if len(later) < len(path) else []

    def _of_prompt(self, prompt_id: str) -> list[str]:
        """The misfits of one queued graph, which may run the model several times: a later run must not take back what
        was said of an earlier one, and the next graph begins anew."""
        lines = dict(self.misfits).get(prompt_id)
        if lines is None:
            # Of earlier graphs only those with misfits are kept, for the history, and not without end.
            with_misfits = [pair for pair in self.misfits if pair[1]][-MOST_PROMPTS:]
            lines = []
            # Under the lock by which the host copies its history, in another thread.
            with PromptServer.instance.prompt_queue.mutex:
                self.misfits[:] = [*with_misfits, (prompt_id, lines)]
        return lines


def is_judged(sampler: Any) -> bool:
    """Whether a SAMPLER is of one of our nodes that say themselves what does not fit."""
    return bool((options_of(sampler) or {}).get("judged"))


def misfits(
    recipe: Recipe, guider: Any, latent: Tensor, sampler: Any, sigmas: Tensor, path: list[dict[str, Any]]
) -> list[str]:
    """Settings of a run that do not fit a LoRA, each as one sentence that says what to change.

    path: the sampler's `graph.model_path`.

    Not judged: runs of nodes that do so themselves, runs towards noise, samplers that are neither the host's
    nor ours, and the levels of a model whose schedule is not its base's.
    """
    options = options_of(sampler)
    model = guider.model_patcher
    if len(sigmas) < 2 or sigmas[0] <= sigmas[-1] or is_judged(sampler):
        return []

    recipe = recipe_seen(model, on_schedule_of(model, recipe), latent)
    ticks = recipe.schedule().tick(sigmas.cpu()).tolist()
    steps = len(ticks) - 1 if is_whole(ticks) else recipe.steps
    cfg = cfg_to_judge(model, recipe, cfg_of(guider))
    fault = sampling_fault(model, recipe)
    of_latent = (
        size_fault(model, *pixels_of(model, latent)),
        pictures_fault(model, latent),
        shift_fault(path, model, recipe, latent),
    )
    return [
        *filter(None, [*of_latent, fault]),
        *recipe.warnings(steps, cfg, model_family(model)),
        *_sampler_misfit(recipe, sampler, options),
        *([] if fault else _level_misfit(recipe, model, ticks, is_empty(latent))),
    ]


def _sampler_misfit(recipe: Recipe, sampler: Any, options: dict[str, Any] | None) -> list[str]:
    """A sampler that makes another share of the noise fresh than the recipe; options: as by `options_of`."""
    # Where a share of the noise is fresh, as in TCD, gamma is made to be changed: more, less, all and none
    # suit as well.
    any_gamma = recipe.gamma not in SUITED
    if options is not None:
        fits = options["min_alpha"] == recipe.min_alpha and (any_gamma or options["gamma"] == recipe.gamma)
        return [] if fits else ["PCM Sampler's mode is not this LoRA's: set it to 'from recipe'."]
    function = getattr(sampler, "sampler_function", None)
    if not getattr(function, "__module__", "").startswith("comfy.") or sampler.extra_options.get("eta") == 0:
        return []
    name = function.__name__.removeprefix("sample_").removesuffix("_function").replace("unipc", "uni_pc")
    suited = sum(SUITED.values(), ()) if any_gamma else SUITED[recipe.gamma]
    if recipe.min_alpha:  # no core sampler has the clamp
        suited = ()
    if name in suited:
        return []
    take = f"{suited[0]}, or " if suited and not any_gamma else ""
    return [f"Sampler {name} does not suit this LoRA: take {take}PCM Sampler."]


def _level_misfit(recipe: Recipe, model: Any, ticks: list[float], empty: bool) -> list[str]:
    """Levels that the LoRA does not know, by the likeliest cause: a node that moves them, shift, scheduler."""
    is_known = recipe.has_levels(ticks)
    recipe_ticks = recipe.grid().plan(recipe.steps).ticks
    if moves(model, recipe_ticks) and (not is_known or moves(model, tuple(map(round, ticks)))):
        return [MOVED]
    if is_known or not is_on_base_schedule(model, recipe):
        return []
    shift = shift_of(model)
    if shift is not None and not same_shift(shift, recipe.shift):
        return [f"Shift {shift:.4g} is not this LoRA's: remove the node that sets it."]
    simple_fits = _simple_fits(recipe, model)
    if is_whole(ticks) or empty:
        simple = "scheduler simple, or " if simple_fits else ""
        return [f"This LoRA never saw these sigmas: take {simple}PCM Scheduler."]
    if not simple_fits or recipe.steps == 1:
        return ["This LoRA never saw these sigmas: take the denoise of Sample PCM or PCM Scheduler."]
    # core's KSampler takes the last `steps` of steps / denoise levels: those of the LoRA, where that is its number
    steps = min(max(1, round(recipe.steps * ticks[0] / TICKS)), recipe.steps - 1)
    denoise = steps / recipe.steps
    return [f"This LoRA never saw these sigmas: for denoise {denoise:g} set steps to {steps}, scheduler simple."]


def _simple_fits(recipe: Recipe, model: Any) -> bool:
    """Whether the host's scheduler `simple` has this LoRA's levels."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", recipe.steps)
    return recipe.has_levels(recipe.schedule().tick(sigmas).tolist())
