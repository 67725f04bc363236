"""The node that loads a PCM LoRA and says how it must be sampled."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..samplers.lora_file import read_header
from ..samplers.lora_info import recipe_of
from . import inputs, lora_on_model, lora_patches, lora_report
from .experts import wrong_expert
from .graph import model_path
from .host import RecipeType, menu_of, show, speaking, warned
from .loras_in_graph import doubled
from .previews import set_colours
from .watch import Watch


class PCMLoadLora(io.ComfyNode):
    """Load PCM LoRA: patch the model, and read the recipe from the file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMLoadLora",
            display_name="Load PCM LoRA",
            category=menu_of("LoraLoaderModelOnly"),
            description="Loads a few-step LoRA (PCM, LCM, TCD, Hyper-SD, Lightning, DMD2, Flash, Turbo) whatever its "
            "keys are called, checks that it fits the model, and tells how it must be sampled: steps, CFG, mode.",
            search_aliases=[
                *("pcm", "phased consistency", "few-step lora", "4 step lora", "lora recipe"),
                *("lcm lora", "tcd lora", "hyper-sd", "lightning", "dmd2", "turbo"),
            ],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint to speed up: of the family the LoRA was made for."),
                inputs.lora("A .safetensors file in models/loras. Its name matters only if it carries no recipe."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the LoRA is applied. Keep 1, as made, unless the node says another. 0 leaves "
                    "the model as it is.",
                ),
                *inputs.recipe_widgets(
                    "from the file's header, else from the table of known files, else from the widgets below"
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the LoRA. More LoRAs may be added after it."
                ),
                RecipeType.Output(display_name="recipe", tooltip="How to sample this LoRA. For the other PCM nodes."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **others) -> str:
        return inputs.lora_state(lora)

    @classmethod
    def execute(cls, model, lora: str, strength: float, recipe: str, **widgets: Any) -> io.NodeOutput:
        header = read_header(folder_paths.get_full_path_or_raise("loras", lora))
        recipe_in_file = recipe_of(header, lora_on_model.flow_family(model)) if recipe == "auto" else None
        family = header.family or (recipe_in_file.family if recipe_in_file else None)

        # By the header alone: a file that does not fit is refused before any of its tensors is read.
        matched = lora_patches.match(header, model)
        lora_report.check(header, matched, model, family)

        used = recipe_in_file
        if used is None:
            used = lora_on_model.recipe_from_widgets(model, **widgets)
        used = lora_on_model.on_schedule_if_set(model, used)

        # At 0 the very model goes on, with no attachment, shift or watch: the nodes after it see that the
        # LoRA is off.
        patched, refused = model, []
        if strength:
            patched, refused = lora_patches.apply(header, matched, model, strength)
            patched = lora_on_model.carrying(patched, used, header.path.name)

        path = model_path(cls.hidden.prompt, cls.hidden.unique_id)
        fast_already = doubled(path, lora_on_model.model_family(model))
        faults = [*refused, *wrong_expert(path, used)]
        lines = warned(faults) + lora_report.report(header, matched, used, strength, model, patched, fast_already)
        settled = recipe_in_file is not None or recipe != "auto"
        if not settled:
            unknown = "Nothing is known of this file: set its phases, mode and cfg, and recipe to widgets."
            lines = [*warned([unknown]), *lines]
        set_colours(patched)
        watch = Watch(cls, used, lines)
        # Widgets that nobody has set are no measure for samplers that run the model.
        if strength and settled:
            watch.put_on(patched)
        return io.NodeOutput(patched, used, ui=show(cls, lines, watch.misfits))
