"""Facts that are in the graph and not in a MODEL: LoRAs that it has come through, words of prompts.

An entry is one node of a queued graph, {"class_type", "inputs"}; an input is a value, or a link [node id,
output].
"""

from __future__ import annotations

from typing import Any

from .host import core
from .loras_in_graph import few_step_loras

Graph = dict[str, dict[str, Any]]  # as it was queued: node id -> entry
TEXTS = ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl")  # inputs of core's text encoding nodes


def model_path(graph: Graph | None, node: str) -> list[dict[str, Any]]:
    """Entries that a node's model has come through, the last first: as far back as each has an input `model`.

    Before each stand the stackers that hand it their LoRAs.
    """
    path = []
    entry = (graph or {}).get(node)
    while entry and (entry := _before(graph, entry, "model")):
        stacker = entry
        while stacker := _before(graph, stacker, "lora_stack"):
            path.append(stacker)
        path.append(entry)
    return path


def has_links(entry: dict[str, Any]) -> bool:
    """Whether a node takes anything from another, as a checkpoint's loader does not."""
    return any(isinstance(value, list) for value in entry["inputs"].values())


def is_bare(path: list[dict[str, Any]]) -> bool:
    """Whether a `model_path` shows that no few-step LoRA is on the model, unless one is merged in.

    It has to begin at a loader, and to have nodes of the host and this pack alone: the inputs of other packs'
    nodes do not tell what these do.
    """
    return bool(path) and not has_links(path[-1]) and all(map(_is_known, path)) and not few_step_loras(path, False)


def _is_known(entry: dict[str, Any]) -> bool:
    """Whether a node is the host's or this pack's, which may be installed under any folder's name."""
    module = _module_of(entry["class_type"])
    return module == _module_of("PCMLoadLora") or not module.startswith("custom_nodes.")


def _module_of(class_type: str) -> str:
    """The module that a node came with, "custom_nodes.<folder>" for a pack's."""
    return getattr(core.NODE_CLASS_MAPPINGS[class_type], "RELATIVE_PYTHON_MODULE", None) or ""


def has_negative_words(graph: Graph | None, node: str) -> bool:
    """Whether the negative prompt of a node has words in it, where the graph shows them."""
    entry = (graph or {}).get(node)
    # Workflows at CFG 1 link the positive prompt to both: nobody means it as a negative one.
    if not entry or entry["inputs"].get("negative") == entry["inputs"].get("positive"):
        return False
    while entry and entry["class_type"] != "ConditioningZeroOut":
        if any(isinstance(entry["inputs"].get(text), str) and entry["inputs"][text].strip() for text in TEXTS):
            return True
        entry = _before(graph, entry, "negative" if "negative" in entry["inputs"] else "conditioning")
    return False


def _before(graph: Graph, entry: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The entry that an input is linked to; None where it is not linked."""
    link = entry["inputs"].get(name)
    return graph.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None
