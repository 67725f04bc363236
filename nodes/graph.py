"""Facts that are in the graph and not in a MODEL: LoRAs that it has come through, words of prompts.

An entry is one node of a queued graph, {"class_type", "inputs"}; an input is a value, or a link [node id,
output].
"""

from __future__ import annotations

from typing import Any

from comfy.comfy_types import IO
from server import PromptServer

from .host import core
from .loras_in_graph import few_step_checkpoints, few_step_loras

Graph = dict[str, dict[str, Any]]  # as it was queued: node id -> entry
# inputs of core's text encoding nodes, and of loaders that encode prompts themselves
TEXTS = ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "negative")
# types of the host that bring no model; a guider has one
OTHERS = [kind.value for kind in IO if kind not in (IO.MODEL, IO.GUIDER, IO.ANY)]
STACK = "lora_stack"  # in the name of an input: LoRAs that a node puts on its model


def model_path(graph: Graph | None, node: str) -> list[dict[str, Any]]:
    """Entries that a node's model has come through, the last first: as far back as the links tell which they are.

    Before each stand the stackers that hand it their LoRAs.
    """
    graph, path = graph or {}, []
    entry = graph.get(node)
    while entry and (entry := _model_source(graph, entry)):
        stackers = _stackers(graph, entry)
        while stackers:
            path += stackers
            stackers = [before for each in stackers for before in _stackers(graph, each)]
        path.append(entry)
    return path


def running_graph(prompt_id: str) -> Graph | None:
    """The graph that the host is at, if it is the one of this id; a loader may have been executed in an earlier one."""
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return next((graph for _, key, graph, *_ in running if key == prompt_id), None)


def _model_source(graph: Graph, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The entry that a node has its model from: by its input `model`, else by a link that a model may come by.

    That is a link of any type but the host's others: packs have types of their own for a model and its prompts in
    one. Which of several counts is not known, unless nothing else is set on a pack's node: then it is a switch, and
    takes the first.
    """
    links = _links(graph, entry)
    if "model" in links:
        return links["model"][0]
    carriers = [before for name, (before, slot) in links.items() if STACK not in name and _may_give(before, slot)]
    if len(carriers) > 1 and (len(links) < len(entry["inputs"]) or _is_known(entry)):
        return None
    return carriers[0] if carriers else None


def _may_give(entry: dict[str, Any], slot: int) -> bool:
    """Whether a node may give a model by an output, alone or with other things: by the type that it declares."""
    kinds = getattr(core.NODE_CLASS_MAPPINGS.get(entry["class_type"]), "RETURN_TYPES", ())
    kind = kinds[slot] if slot < len(kinds) else None
    return isinstance(kind, str) and f"{kind}" not in OTHERS  # a pack's string may say that it equals any other


def _stackers(graph: Graph, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries that hand a node their LoRAs."""
    return [before for name, (before, _) in _links(graph, entry).items() if STACK in name]


def has_links(entry: dict[str, Any]) -> bool:
    """Whether a node takes anything from another, as a checkpoint's loader does not."""
    return any(isinstance(value, list) for value in entry["inputs"].values())


def is_bare(path: list[dict[str, Any]], family: str | None) -> bool:
    """Whether a `model_path` shows that no few-step LoRA is on a model of this family, unless one is merged in that its
    file does not tell of.

    It has to begin at a loader, and to have nodes of the host and this pack alone: the inputs of other packs'
    nodes do not tell what these do.
    """
    is_whole = bool(path) and not has_links(path[-1]) and all(map(_is_known, path))
    return is_whole and not few_step_loras(path, certain=False) and not few_step_checkpoints(path, family)


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


def conditioning_path(graph: Graph | None, node: str, name: str) -> list[dict[str, Any]]:
    """Entries that a prompt of a node, its input `name`, has come through, the last first; none where the graph does
    not show them."""
    path, entry = [], (graph or {}).get(node)
    while entry and (entry := _before(graph, entry, name)) and entry not in path:
        path.append(entry)
        name = name if name in entry["inputs"] else "conditioning"
    return path


def _before(graph: Graph, entry: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The entry that an input is linked to; None where it is not linked."""
    return _links(graph, entry).get(name, (None, 0))[0]


def _links(graph: Graph, entry: dict[str, Any]) -> dict[str, tuple[dict[str, Any], int]]:
    """The inputs of a node that are linked, by name: the entry and the output that each is linked to."""
    pairs = {name: value for name, value in entry["inputs"].items() if isinstance(value, list) and len(value) == 2}
    links = {name: (graph.get(str(node)), slot) for name, (node, slot) in pairs.items() if isinstance(slot, int)}
    return {name: link for name, link in links.items() if link[0]}
