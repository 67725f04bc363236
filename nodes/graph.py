"""What the graph tells and a MODEL does not: the LoRAs that it has come through, and whether a prompt says anything."""

from __future__ import annotations

from typing import Any

import folder_paths

from ..samplers import recipe_for_file
from ..samplers.lora_file import read_header
from .host import core

Graph = dict[str, dict[str, Any]]  # as it was queued: node id -> class_type, inputs
TEXTS = ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl")  # inputs of core's text encoding nodes


def model_path(graph: Graph | None, node: str) -> list[dict[str, Any]]:
    """The nodes that a node's model has come through, the last first: as far as each has an input `model`."""
    path, at = [], (graph or {}).get(node)
    while at and (at := _before(graph, at, "model")):
        path.append(at)
    return path


def has_links(at: dict[str, Any]) -> bool:
    """Whether a node takes anything from another, as a checkpoint's loader does not."""
    return any(isinstance(value, list) for value in at["inputs"].values())


def is_bare(path: list[dict[str, Any]]) -> bool:
    """Whether such a path tells that there is no few-step LoRA on the model, unless its checkpoint has one merged in.

    It begins at a loader, and has nodes of the host and this pack alone: what others do, their inputs do not tell.
    """
    return bool(path) and not has_links(path[-1]) and all(map(_is_known, path)) and not few_step_loras(path, False)


def _is_known(at: dict[str, Any]) -> bool:
    kinds = core.NODE_CLASS_MAPPINGS
    place, ours = (getattr(kinds[k], "RELATIVE_PYTHON_MODULE", None) or "" for k in (at["class_type"], "PCMLoadLora"))
    return place == ours or not place.startswith("custom_nodes.")


def few_step_loras(path: list[dict[str, Any]], certain: bool = True) -> list[str]:
    """The files of such a path that core's LoRA loaders, and those like them, put on the model and that speed it up.

    Those with a recipe or of a known name, at a strength that is set on the node and not 0. certain: not by a name
    that a style's LoRA may have, too.
    """
    found = ((at["inputs"].get("lora_name"), at["inputs"].get("strength_model", 0)) for at in path)
    set_on = [name for name, strength in found if isinstance(strength, int | float) and strength]
    return [name for name in set_on if is_few_step(name, certain)]


def is_few_step(lora: Any, certain: bool) -> bool:
    """Whether this name is of a LoRA file that has a recipe; certain: as in `recipe_for_file`."""
    path = folder_paths.get_full_path("loras", lora) if isinstance(lora, str) else None
    try:
        header = read_header(path) if path else None
        return header is not None and recipe_for_file(path, header.metadata, header.family, certain) is not None
    except (ValueError, OSError):  # of another format, or damaged: the loader that it is on says so
        return False


def has_negative_words(graph: Graph | None, node: str) -> bool:
    """Whether the negative prompt of a node has words in it, where the graph shows them."""
    at = (graph or {}).get(node)
    if not at or at["inputs"].get("negative") == at["inputs"].get("positive"):
        return False
    while at and at["class_type"] != "ConditioningZeroOut":
        if any(isinstance(at["inputs"].get(text), str) and at["inputs"][text].strip() for text in TEXTS):
            return True
        at = _before(graph, at, "negative" if "negative" in at["inputs"] else "conditioning")
    return False


def _before(graph: Graph, at: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The node that an input is linked to."""
    link = at["inputs"].get(name)
    return graph.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None
