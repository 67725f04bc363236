"""The templates that the pack ships. In tests/, with a ComfyUI running that has this pack:

    python -m host.templates http://127.0.0.1:8188

writes them anew; test_workflow.py compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from host.templates import demo, edits, pictures, transformers
from host.workflows import written

FOLDER = Path(__file__).parents[3] / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))  # as they are shipped
APP = {"PCMDemoPrompt": ("text",), "PCMSample": ("seed", "steps", "cfg")}  # kinds of nodes -> widgets
TEMPLATES = (*demo.TEMPLATES, *pictures.TEMPLATES, *edits.TEMPLATES, pictures.cfg_schedule, *transformers.TEMPLATES)


def files(kinds: dict[str, Any]) -> dict[Path, str]:
    """Every template's file, for a host with these nodes (*/object_info*)."""
    workflows = [make() for make in TEMPLATES]
    return {FOLDER / f"{workflow.name}.json": written(with_app(workflow.graph(kinds))) for workflow in workflows}


def with_app(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with what App Mode shows of it, where it is the demo's: the first prompt and what one tries first."""
    nodes = {node["type"]: str(node["id"]) for node in reversed(graph["nodes"])}
    if not nodes.keys() >= APP.keys() or "SaveImage" not in nodes:
        return graph
    inputs = [[nodes[kind], name] for kind, names in APP.items() for name in names]
    return graph | {"extra": graph["extra"] | {"linearData": {"inputs": inputs, "outputs": [nodes["SaveImage"]]}}}
