"""The nodes about a LoRA file itself: the facts in its header, and a copy of it that carries a recipe."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..samplers import Recipe
from ..samplers.lora_file import LoraHeader, read_header
from ..samplers.lora_info import facts, noted, recipe_of, sentences
from ..samplers.recipe import HEADER_KEY
from ..samplers.writing import path_within, stamp_recipe
from . import inputs, lora_on_model, lora_patches, lora_report
from .host import menu_of, show, speaking


class PCMLoraInfo(io.ComfyNode):
    """PCM LoRA Info: the header as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMLoraInfo",
            display_name="PCM LoRA Info",
            category=menu_of("LoraLoaderModelOnly"),
            description="Tells what a LoRA file is: family, method, how to sample it, rank, alpha, size, what its "
            "header says, and how much of it fits a model. Loads nothing.",
            search_aliases=["pcm", "lora info", "lora metadata", "lora header", "inspect lora", "rank", "alpha"],
            is_output_node=True,
            inputs=[
                inputs.lora("A .safetensors file in models/loras: any LoRA, of a few steps or not."),
                io.Model.Input(
                    "model", optional=True, tooltip="To count how many of the LoRA's modules have a place in this one."
                ),
            ],
            outputs=[
                io.String.Output(display_name="info", tooltip="What the node says, to show in a text node and copy."),
                io.String.Output(
                    display_name="header", tooltip="Every entry of the file's header as it is, a line for each."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **others) -> str:
        return inputs.lora_state(lora)

    @classmethod
    def execute(cls, lora: str, model=None) -> io.NodeOutput:
        header = read_header(folder_paths.get_full_path_or_raise("loras", lora))
        values = facts(header)
        lines = sentences(values) + noted(header.metadata, values["usage"])
        if model is not None:
            lines[1:1] = fit(header, model)
        entries = "\n".join(f"{key}: {value}" for key, value in sorted(header.metadata.items()))
        return io.NodeOutput("\n".join(lines), entries, ui=show(cls, lines))


class PCMStampRecipe(io.ComfyNode):
    """PCM Stamp Recipe: a copy of a LoRA file with a recipe in its header."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMStampRecipe",
            display_name="PCM Stamp Recipe",
            category=menu_of("LoraLoaderModelOnly"),
            description="Writes a copy of a LoRA file that carries its recipe in the header, so that nobody has to set "
            "the widgets again, whatever the file is called. The weights are copied byte for byte.",
            search_aliases=["pcm", "save recipe", "write metadata", "lora metadata", "tag lora", "usage hint"],
            is_output_node=True,
            inputs=[
                inputs.lora("The file to copy. It stays as it is."),
                inputs.recipe("From Load PCM LoRA with the same file, its widgets set as the LoRA wants them.", False),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the copy in the first models/loras folder; subfolders are allowed, as in "
                    "fast/style_4_steps. Empty: as the file, with _recipe after its name.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Whether another file of that name may be replaced. The file that is copied never is.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, name: str | None = None, **others) -> str | float:
        # A linked name is not known yet: always run, since the copy may be gone. The host runs a node whose
        # value differs from the last one, and takes one object for unchanged: so no
        # math.nan, but a new nan each time.
        if name is None:
            return float("nan")
        return f"{inputs.lora_state(lora)} {inputs.file_state(copy_of(lora, name))}"

    @classmethod
    def execute(cls, lora: str, recipe: Recipe, name: str, overwrite: bool) -> io.NodeOutput:
        source = Path(folder_paths.get_full_path_or_raise("loras", lora))
        target = copy_of(lora, name)
        written = stamp_recipe(source, target, recipe, overwrite)

        name_in_folder = target.relative_to(folder_paths.get_folder_paths("loras")[0])
        lines = [f"{'Written' if written else 'There already'}: {name_in_folder}.", recipe.usage_hint()]
        metadata = read_header(source).metadata
        if HEADER_KEY in metadata:
            lines.append("It takes the place of the recipe that the file had.")
        elif "modelspec.usage_hint" in metadata:
            lines.append("Its sentence takes the place of the usage hint that the file had.")
        lines.append(f"Path: {target}")
        return io.NodeOutput(ui=show(cls, lines))


def copy_of(lora: str, name: str) -> Path:
    """The path of a LoRA's copy of this name. Raises ValueError for a name that leads out of models/loras."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    return path_within(folder, name.strip() or f"{Path(lora).with_suffix('')}_recipe")


def fit(header: LoraHeader, model) -> list[str]:
    """The share of a LoRA that has a place in a host MODEL, or the reason why nothing has, in sentences."""
    matched = lora_patches.match(header, model)
    recipe = recipe_of(header, lora_on_model.flow_family(model))
    try:
        lora_report.check(header, matched, model, header.family or (recipe.family if recipe else None))
    except ValueError as error:
        return [str(error)]
    lines = [f"{len(matched.places)} of {matched.total} modules match this {lora_on_model.model_title(model)} model."]
    lines += matched.sentences()
    if matched.text_modules:
        lines.append(f"{matched.text_modules} more are a text encoder's.")
    return lines
