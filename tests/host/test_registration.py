"""The pack in a real host: it loads, cheaply, and every node explains itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from host.graphs import loaded, scheduler
from host.server import out

NODES = (
    *("PCMLoadLora", "PCMScheduler", "PCMSampler", "PCMSample"),
    *("PCMInpaint", "PCMOutpaint", "PCMColorize", "PCMSuperResolution", "PCMStroke", "PCMDenoise", "PCMInterpolate"),
    *("PCMInpaintOperator", "PCMOutpaintOperator", "PCMColorizeOperator", "PCMSuperResolutionOperator"),
    *("PCMEditSampler", "PCMEditDecode"),
    *("PCMLoraInfo", "PCMStampRecipe"),
    *("PCMCompare", "PCMCFGSchedule"),
    "PCMDemoPrompt",
)
DOCS = Path(__file__).parents[2] / "nodes" / "web" / "docs"


def test_the_pack_loads_without_a_complaint(server):
    assert "phased-consistency" in server.log
    for complaint in ("IMPORT FAILED", "Error while calling comfy_entrypoint", "Cannot import"):
        assert complaint not in server.log


def test_import_takes_no_time_to_speak_of(server):
    seconds = re.search(r"(\d+\.\d+) seconds: .*phased-consistency", server.log)
    assert float(seconds[1]) < 3.0  # 0.0 on a quiet machine; one import of a model library takes more than this


def test_the_trainer_and_its_libraries_are_not_imported(server):
    graph, links = loaded()
    show = graph.add("TestSigmas", sigmas=out(scheduler(graph, links)))
    modules = server.run(graph).outputs[show]["modules"]
    libraries = ("diffusers", "peft", "accelerate")
    assert [m for m in modules if m.split(".")[0] in libraries or m.endswith("phased-consistency.trainer")] == []


@pytest.mark.parametrize("node", NODES)
def test_every_node_explains_itself(server, node):
    info = server.get(f"/object_info/{node}")[node]
    assert info["display_name"] and info["description"]
    assert info["category"].split("/")[0] in ("model", "loaders", "sampling", "latent", "conditioning")
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert [name for name, spec in inputs.items() if not spec[1].get("tooltip")] == []
    assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"])


@pytest.mark.parametrize("node", NODES)
def test_help_pages_name_every_input(server, node):
    page = (DOCS / f"{node}.md").read_text(encoding="utf-8")
    info = server.get(f"/object_info/{node}")[node]
    names = [*info["input"]["required"], *info["input"].get("optional", {})]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_menus_are_the_hosts_own(server):
    ours = {"PCMLoadLora": "LoraLoaderModelOnly", "PCMScheduler": "BasicScheduler", "PCMSampler": "KSamplerSelect"}
    for node, neighbour in ours.items():
        categories = [server.get(f"/object_info/{n}")[n]["category"] for n in (node, neighbour)]
        assert categories[0] == categories[1]


def test_the_hosts_sampler_and_scheduler_lists_are_untouched(server):
    ksampler = server.get("/object_info/KSampler")["KSampler"]["input"]["required"]
    assert not [name for key in ("sampler_name", "scheduler") for name in ksampler[key][0] if "pcm" in name.lower()]
