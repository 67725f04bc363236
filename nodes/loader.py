"""The node that loads a PCM LoRA and says how it must be sampled."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..samplers.lora_file import read_header
from ..samplers.lora_info import recipe_of
from ..samplers.recipe import MODES
from . import inputs, lora_on_model, lora_patches, lora_report
from .graph import model_path
from .host import RecipeType, menu_of, show, speaking, supported
from .loras_in_graph import doubled
from .watch import Watch

LEVELS = ("even", "lcm")


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
                *_recipe_widgets(),
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
    def execute(
        cls,
        model,
        lora: str,
        strength: float,
        recipe: str,
        phases: int,
        mode: str,
        cfg: float,
        gamma: float = 1.0,
        levels: str = LEVELS[0],
    ) -> io.NodeOutput:
        header = read_header(folder_paths.get_full_path_or_raise("loras", lora))
        recipe_in_file = recipe_of(header) if recipe == "auto" else None
        family = header.family or (recipe_in_file.family if recipe_in_file else None)

        # By the header alone: a file that does not fit is refused before any of its tensors is read.
        matched = lora_patches.match(header, model)
        lora_report.check(header, matched, model, family)

        used = recipe_in_file
        if used is None:
            used = lora_on_model.recipe_from_settings(model, phases, mode, cfg, gamma, distilled=levels == LEVELS[1])
        # A recipe knows the base that the LoRA was made on. This model's own schedule decides where sampling
        # starts, unless a later node is still to set it.
        if not lora_on_model.awaits_schedule(model, used):
            used = lora_on_model.on_schedule_of(model, used)

        # At 0 the very model goes on, with no attachment, shift or watch: the nodes after it see that the
        # LoRA is off.
        patched, refused = model, []
        if strength:
            patched, refused = lora_patches.apply(header, matched, model, strength)
            patched.set_attachments(lora_on_model.LOADED, header.path.name)
            lora_on_model.set_shift(patched, used.shift)

        fast_already = doubled(model_path(cls.hidden.prompt, cls.hidden.unique_id))
        lines = refused + lora_report.report(header, matched, used, strength, model, patched, fast_already)
        settled = recipe_in_file is not None or recipe != "auto"
        if not settled:
            lines.insert(0, "Nothing is known of this file: set its phases, mode and cfg, and recipe to widgets.")
        # Widgets that nobody has set are no measure for samplers that run the model.
        if strength and settled:
            Watch(cls, used, lines).put_on(patched)
        return io.NodeOutput(patched, used, ui=show(cls, lines))


def _recipe_widgets() -> list[io.Input]:
    """Widgets for the recipe of a file that carries none and is not known."""
    return [
        supported(
            io.Combo.Input,
            "recipe",
            options=["auto", "widgets"],
            default="auto",
            advanced=True,
            tooltip="auto: from the file's header, else from the table of known files, else from the widgets below. "
            "widgets: always from the widgets below.",
        ),
        supported(
            io.Int.Input,
            "phases",
            default=4,
            min=1,
            max=40,
            advanced=True,
            tooltip="Steps that the LoRA was made for. Read only where the recipe comes from the widgets.",
        ),
        supported(
            io.Combo.Input,
            "mode",
            options=list(MODES),
            default=MODES[0],
            advanced=True,
            tooltip="deterministic for PCM, Hyper-SD and Lightning LoRAs, stochastic for LCM, TCD and DMD2. "
            "Read only where the recipe comes from the widgets.",
        ),
        supported(
            io.Float.Input,
            "cfg",
            default=1.0,
            min=1.0,
            max=20.0,
            step=0.1,
            advanced=True,
            tooltip="CFG that the LoRA was made for; 1 is no guidance. "
            "Read only where the recipe comes from the widgets.",
        ),
        supported(
            io.Float.Input,
            "gamma",
            optional=True,  # as are the widgets after it: graphs of earlier versions have none
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="How much of the noise between steps is fresh, in the mode stochastic: 1 for LCM and DMD2, 0.3 for "
            "TCD. Read only where the recipe comes from the widgets.",
        ),
        supported(
            io.Combo.Input,
            "levels",
            optional=True,
            options=list(LEVELS),
            default=LEVELS[0],
            advanced=True,
            tooltip="even: timesteps 999, 749, 499, 249 for 4 steps, as PCM, Hyper-SD, Lightning and DMD2. "
            "lcm: 999, 759, 499, 259, as LCM and TCD. Read only where the recipe comes from the widgets.",
        ),
    ]
