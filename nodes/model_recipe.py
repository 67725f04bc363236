"""The node that tells how a model is sampled which has a few-step LoRA by other means than Load PCM LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..samplers import Recipe
from ..samplers.known_files import METHOD_FILES, recipe_for_method
from ..samplers.phases import count_steps
from ..samplers.recipe import SOURCES
from . import inputs
from .graph import model_path
from .host import RecipeType, menu_of, show, speaking, warned
from .lora_on_model import (
    BY_NODE,
    LOADED,
    carrying,
    known_family,
    model_title,
    on_schedule_if_set,
    prediction_of,
    recipe_from_widgets,
    sampling_fault,
    shift_of,
)
from .loras_in_graph import doubled, shown_recipe
from .watch import Watch

AUTO = (
    "by the few-step LoRA that another pack's loader puts on the model, else by the checkpoint's header or name, else "
    "from the widgets below"
)


class PCMRecipe(io.ComfyNode):
    """PCM Recipe: a recipe for a merged or distilled checkpoint, or for a LoRA that another pack has loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMRecipe",
            display_name="PCM Recipe",
            category=menu_of("LoraLoaderModelOnly"),
            description="Tells how to sample a model that is made for few steps already: a checkpoint with such a LoRA "
            "merged in, a distilled one (Turbo, Lightning, LCM, DMD2), or one whose LoRA another pack has loaded.",
            search_aliases=[
                *("pcm", "phased consistency", "few-step checkpoint", "merged", "distilled"),
                *("turbo", "lightning", "lcm", "dmd2", "hyper-sd"),
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model that is made for few steps. It is sampled as the recipe says."
                ),
                *inputs.recipe_widgets(AUTO, METHOD_FILES),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, with its recipe, for any sampler."),
                RecipeType.Output(display_name="recipe", tooltip="How to sample it. For the other PCM nodes."),
            ],
        )

    @classmethod
    def execute(cls, model, recipe: str, **widgets: Any) -> io.NodeOutput:
        inputs.check("recipe", recipe, ("auto", *METHOD_FILES, "widgets"))
        family = known_family(model)
        path = model_path(cls.hidden.prompt, cls.hidden.unique_id)
        shown = shown_recipe(path, family) if recipe == "auto" else None
        settled = shown is not None or recipe != "auto"
        file = None
        if shown:
            file, used = shown
        elif recipe in METHOD_FILES:
            used = recipe_for_method(recipe, family, widgets["phases"])
        else:
            used = recipe_from_widgets(model, **widgets)
        used = on_schedule_if_set(model, as_predicted(used, model))

        patched = carrying(model.clone(), used, (file or BY_NODE) if settled else None)
        lines = report(used, file or model_title(model), model, patched, doubled(path, family))
        if not settled:
            lines += warned(["Nothing is known of this model: choose its method in recipe, or widgets for your own."])
        watch = Watch(cls, used, lines)
        if settled:  # widgets that nobody has set are no measure for samplers
            watch.put_on(patched)
        return io.NodeOutput(patched, used, ui=show(cls, lines, watch.misfits))


def as_predicted(recipe: Recipe, model: Any) -> Recipe:
    """The recipe for what a host MODEL predicts, noise or v: a checkpoint's own prediction is no mistake."""
    prediction = prediction_of(model.get_model_object("model_sampling"))
    return recipe if "flow" in (prediction, recipe.prediction) else replace(recipe, prediction=prediction)


def report(recipe: Recipe, name: str, model: Any, patched: Any, fast: list[str]) -> list[str]:
    """Lines for the node: faults, then how to sample the model, and where the recipe comes from.

    name: of the file that the recipe is of, or the model's. model, patched: the host MODEL before and after. fast: a
    sentence for each thing in the graph that speeds the model up, of which the first is what the recipe is for.
    """
    faults = fast[1:2]
    if loaded := model.get_attachment(LOADED):
        faults.append(f"{loaded} is on this model and has a recipe of its own: remove this node.")
    if fault := sampling_fault(model, recipe):
        faults.append(fault)
    lines = [
        *warned(faults),
        f"{count_steps(recipe.steps)}, {recipe.guidance_text}, {recipe.mode_text}.",
        f"{name}: {recipe.method}, by {SOURCES[recipe.source]}.",
    ]
    if shift_of(patched) != shift_of(model):
        lines.append(f"Shift set to {shift_of(patched):.4g}, the recipe's; it was {shift_of(model):.4g}.")
    return lines
