"""What a queued graph shows of a model's speed: few-step LoRAs, by whatever loader, and a few-step checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import folder_paths

from ..samplers import Recipe, recipe_for_file
from ..samplers.known_files import few_step_source, recipe_for_checkpoint
from ..samplers.lora_file import read_header

IN_TEXT = re.compile(r"<lora:([^:>]+)(?::([-+.\d]*))?")  # as A1111 has it, and nodes that read its prompts
NUMBER = re.compile(r"_\d+$")  # of a slot of a stacker: lora_name_2, model_str_2
STRENGTHS = ("strength_model", "lora_model_strength", "model_str{}", "lora_wt{}", "strength{}")
UNREAD = {"simple": "model_str{}", "advanced": "lora_wt{}"}  # strengths that a stacker has besides, by its input_mode
COUNTS = ("lora_count", "num_loras")  # of the slots of a stacker that are in use
CHECKPOINTS = ("ckpt_name", "unet_name", "base_model_name")  # inputs of loaders
CHECKPOINT_FOLDERS = ("checkpoints", "diffusion_models")
TWICE = "{} is loaded too, and both speed the model up: remove one."
FAST_ALREADY = "{} is a few-step model by its {}: take a plain one, or no LoRA."
TELLS = {"header": "header", "known title": "title"}  # source of a recipe -> what of a file tells it; else its name


def doubled(path: list[dict[str, Any]], family: str | None) -> list[str]:
    """Sentences on what speeds a model of this family up already, by its `graph.model_path`, the last first."""
    loras = dict.fromkeys(few_step_loras(path))  # a node may have one in its prompt and in what came of its wildcards
    fast = few_step_checkpoints(path, family)
    return [
        *(TWICE.format(name) for name in loras),
        *(FAST_ALREADY.format(name, TELLS.get(source, "name")) for name, source in fast.items()),
    ]


def few_step_checkpoints(path: list[dict[str, Any]], family: str | None) -> dict[str, str]:
    """The files of models of this family on a `graph.model_path` that are made for few steps, and what tells so, a key
    of `recipe.SOURCES`."""
    sources = {name: few_step_source(name, _metadata(name), family) for name in checkpoints(path)}
    return {name: source for name, source in sources.items() if source}


def checkpoints(path: list[dict[str, Any]]) -> list[str]:
    """The names of the model files on a `graph.model_path`, the last first."""
    names = (entry["inputs"].get(key) for entry in path for key in CHECKPOINTS)
    return [name for name in names if isinstance(name, str)]


def shown_recipe(path: list[dict[str, Any]], family: str) -> tuple[str, Recipe] | None:
    """What a `graph.model_path` shows of how a model of this family is sampled: a file and its recipe.

    That of the few-step LoRA that another pack's loader puts on the model, else that of the checkpoint.
    """
    for lora in few_step_loras(path):
        if recipe := recipe_of_lora(lora, certain=True):
            return lora, recipe
    for name in checkpoints(path):
        if recipe := recipe_for_checkpoint(name, _metadata(name), family):
            return name, recipe
    return None


def _metadata(checkpoint: str) -> dict[str, str]:
    """The header's entries of a model file; none for a file of another format."""
    paths = filter(None, (folder_paths.get_full_path(folder, checkpoint) for folder in CHECKPOINT_FOLDERS))
    try:
        return read_header(next(paths)).metadata
    except (StopIteration, ValueError, OSError):
        return {}


def few_step_loras(path: list[dict[str, Any]], certain: bool = True) -> list[str]:
    """The files that nodes on a `graph.model_path` put on the model and that speed it up, the last first.

    certain: as in `recipe_for_file`, not by a name that a style's LoRA may have, too.
    """
    return [name for entry in path for name in applied(entry["inputs"]) if recipe_of_lora(name, certain)]


def applied(inputs: dict[str, Any]) -> Iterator[str]:
    """Names that stand for LoRA files among a node's inputs, at a strength that is set there and not 0."""
    for key, value in inputs.items():
        if isinstance(value, dict):
            yield from _of_entry(value)
        elif isinstance(value, str):
            if "lora" in key.lower() and _is_on(inputs, key):
                yield value
            yield from (name for name, strength in IN_TEXT.findall(value) if not strength or strength.strip("+-.0"))


def _of_entry(value: Any) -> Iterator[str]:
    """Names in a widget that holds entries: one of rgthree's Power Lora Loader, or the list of Lora-Manager's."""
    if isinstance(value, list):
        for each in value:
            yield from _of_entry(each)
    elif isinstance(value, dict):
        name = value.get("lora", value.get("name"))
        if isinstance(name, str) and value.get("on", value.get("active", True)) and value.get("strength", 1):
            yield name
        yield from _of_entry(value.get("__value__"))


def _is_on(inputs: dict[str, Any], key: str) -> bool:
    """Whether the file of an input is used: its slot is counted, and a strength beside it is a number that is not 0."""
    number = NUMBER.search(key)
    slot = number[0] if number else ""
    counts = [inputs[name] for name in COUNTS if isinstance(inputs.get(name), int)]
    if slot and counts and int(slot[1:]) > counts[0]:
        return False
    unread = UNREAD.get(str(inputs.get("input_mode")))
    names = [name.format(slot) for name in STRENGTHS if name != unread]
    strengths = [inputs[name] for name in names if name in inputs]
    return not strengths or any(isinstance(strength, int | float) and strength for strength in strengths)


def recipe_of_lora(lora: str, certain: bool) -> Recipe | None:
    """The recipe of a file of this name in models/loras, with or without its ending; certain: see `few_step_loras`."""
    paths = (folder_paths.get_full_path("loras", name) for name in (lora, f"{lora}.safetensors"))
    path = next(filter(None, paths), None)
    try:
        header = read_header(path) if path else None
        return header and recipe_for_file(path, header.metadata, header.family, certain)
    except (ValueError, OSError):  # of another format, or damaged: the loader that it is on says so
        return None
