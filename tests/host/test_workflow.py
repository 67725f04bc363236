"""The workflows as they are shipped: written from their descriptions, whole, and they run and say what they did."""

from __future__ import annotations

import json
import re
from itertools import combinations
from types import SimpleNamespace

import pytest
from PIL import Image

from host import templates
from host.stand_ins import make_small, skip_without_small
from host.templates import WORKFLOWS
from host.workflows import NOTES, ROOT, is_widget, overlap, specs_of, to_api
from phased_consistency.trainer.tiny.comfy import write_files

TITLE = 30  # pixels that a node's title takes above it
FOUR = "4 steps, CFG 1 (1 to 2), deterministic."
WHOLE, EIGHT = (f"{steps} steps at CFG 1, deterministic." for steps in (4, 8))
ONLY = "Only for the checkpoint pcm_demo_emoji."
DEMO = f"{ONLY}\nEmpty: no prompt, as for a negative.\n{ONLY}"
COMPARED = "\n".join(
    f"{steps} step{'s' * (steps > 1)}, deterministic, CFG 1: {steps} evaluation{'s' * (steps > 1)}."
    for steps in (1, 2, 4, 8)
)
DENOISED = r"The noise was estimated: [\d.]+ levels of 255.\n\d steps? at CFG 1, deterministic."
SAID = {  # all that the nodes after Load PCM LoRA say, in their order: a warning would be more
    "00_demo": f"{DEMO}\n{WHOLE}",
    "00_demo_1_compare": f"{DEMO}\n{COMPARED}",
    "00_demo_2_image_to_image": f"{DEMO}\n2 steps at CFG 1, deterministic.",
    "00_demo_3_inpaint": f"{DEMO}\n{WHOLE}",
    "00_demo_4_outpaint": f"{DEMO}\n{WHOLE}",
    "00_demo_5_colorize": f"{DEMO}\n{WHOLE}",
    "00_demo_6_super_resolution": f"{DEMO}\n3 steps at CFG 1, deterministic.",
    "00_demo_7_stroke_to_image": f"{DEMO}\n3 steps at CFG 1, deterministic.\nThe strength is 0.75.",
    "00_demo_8_denoise": f"{DEMO}\n{DENOISED}",
    "00_demo_9_interpolate": f"{ONLY}\n{DEMO}\n{WHOLE}\n8 frames, each of them sampled by itself.",
    "01_text_to_image_sd15": WHOLE,
    "02_text_to_image_sdxl": WHOLE,
    "03_text_to_image_sd3": "4 steps at CFG 1.2, deterministic.",
    "04_compare_steps": COMPARED,
    "05_image_to_image": "2 steps at CFG 1, deterministic.",
    "06_hires_pass": f"{WHOLE}\n2 steps at CFG 1, deterministic.",
    "07_inpaint": WHOLE,
    "08_outpaint": WHOLE,
    "09_colorize": WHOLE,
    "10_super_resolution": "3 steps at CFG 1, deterministic.",
    "11_stroke_to_image": "3 steps at CFG 1, deterministic.\nThe strength is 0.75.",
    "12_denoise": DENOISED,
    "13_interpolate": f"{WHOLE}\n2 frames, each of them sampled by itself.",
    "14_inpaint_with_controlnet": "4 steps, sigmas 14.61, 4.082, 1.613, 0.6932, 0.",
    "15_cfg_schedule": "The other steps are at CFG 1, below the LoRA's 3.\n"
    "CFG 4.5 on steps 1 to 4 of 8, else 1: 12 evaluations; with CFG on all 16, with none 8.\n"
    "8 steps at CFG 4.5 on steps 1 to 4 of 8, else 1, deterministic.",
    "16_flux_turbo": EIGHT,
    "17_qwen_image_lightning": WHOLE,
    "18_z_image_turbo": EIGHT,
    "19_wan22_two_experts": "4 steps, CFG 1 \\(1 to 1\\), deterministic.\n(.+\n)+"
    f"2 steps by the high-noise model, 2 by the low-noise one.\n{WHOLE}",
}
LOADED = {  # what Load PCM LoRA says first
    "03_text_to_image_sd3": "4 steps, CFG 1.2 (1 to 2), deterministic.",
    "15_cfg_schedule": "8 steps, CFG 4.5 (3 to 6), deterministic.",
    "16_flux_turbo": "8 steps, CFG 1 (1 to 1), deterministic.",
    "17_qwen_image_lightning": "4 steps, CFG 1 (1 to 1), deterministic.",
    "18_z_image_turbo": "8 steps, CFG 1 (1 to 1), deterministic.",
    "19_wan22_two_experts": "4 steps, CFG 1 (1 to 1), deterministic.",
}
SIZES = {  # of what comes out, where it is not that of what goes in; None: as the labels are
    "00_demo_1_compare": None,
    "04_compare_steps": None,
    "06_hires_pass": (128, 128),
    "08_outpaint": (96, 64),
}
FOLDERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "CLIPLoader": "text_encoders",
    "ControlNetLoader": "controlnet",
    "DualCLIPLoader": "text_encoders",
    "PCMLoadLora": "loras",
    "UNETLoader": "diffusion_models",
    "VAELoader": "vae",
}
FRAMES = {"00_demo_9_interpolate": 8, "13_interpolate": 2, "19_wan22_two_experts": 5}


def is_demo(name: str) -> bool:
    """Whether a template is drawn by the bundled base."""
    return name.startswith("00_demo")


@pytest.fixture(params=WORKFLOWS, ids=lambda p: p.stem)
def shipped(request: pytest.FixtureRequest, server, picture) -> SimpleNamespace:
    """A workflow by name: its graph, and what its nodes' kinds are like on this host."""
    if is_demo(request.param.stem):  # which has files of its own
        write_files(server.base)
    graph = json.loads(request.param.read_text(encoding="utf-8"))
    types = {node["type"] for node in graph["nodes"]} - set(NOTES)
    kinds = {kind: server.get(f"/object_info/{kind}")[kind] for kind in types}
    return SimpleNamespace(path=request.param, graph=graph, kinds=kinds)


def test_a_shipped_workflow_is_whole(shipped):
    """Every link ends at both its nodes, in slots of its type that the nodes have, and no input lacks one."""
    nodes = {node["id"]: node for node in shipped.graph["nodes"]}
    links = {link[0]: link for link in shipped.graph["links"]}
    for i, source, output, target, slot, kind in links.values():
        names, types = (shipped.kinds[nodes[source]["type"]][part] for part in ("output_name", "output"))
        start, end = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert i in start["links"] and i == end["link"]
        assert (start["name"], start["type"]) == (names[output], types[output])
        assert kind == start["type"] == end["type"] == specs_of(shipped.kinds[nodes[target]["type"]])[end["name"]][0]
    for node in nodes.values():
        if node["type"] not in NOTES:
            required = shipped.kinds[node["type"]]["input"]["required"]
            linked = {socket["name"] for socket in node["inputs"] if socket["link"] in links}
            assert [name for name, spec in required.items() if not is_widget(spec) and name not in linked] == []


def test_a_shipped_workflow_runs_and_says_what_it_did(server, shipped):
    graph, name = to_api(shipped.graph, shipped.kinds), shipped.path.stem
    skip_without_small(server, graph)
    if not is_demo(name):
        make_small(graph)
    run = server.run(graph)
    assert run.error is None, run.error
    kinds = {node: entry["class_type"] for node, entry in graph.items()}
    loaded, *texts = [run.text(i) for i, kind in kinds.items() if kind.startswith("PCM") and i in run.outputs]
    assert loaded.startswith(LOADED.get(name, FOUR))
    assert re.fullmatch(SAID[name], "\n".join(filter(None, texts))), texts
    saved = run.outputs[next(i for i, kind in kinds.items() if kind.startswith("Save"))]["images"][0]
    assert saved["filename"].startswith("pcm")
    with Image.open(server.base / "output" / saved["filename"]) as image:
        usual = (512, 512) if is_demo(name) else (64, 64)
        assert image.size == (SIZES.get(name, usual) or image.size)
        assert getattr(image, "n_frames", 1) == FRAMES.get(name, 1)


def test_a_shipped_workflow_has_a_picture_and_is_offered(server, shipped):
    assert shipped.path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"
    assert shipped.path.stem in server.get("/workflow_templates")["phased-consistency"]


def test_the_shipped_workflows_are_those_described(server):
    """Run `python -m host.templates` after a change (see there)."""
    described = templates.files(server.get("/object_info"))
    assert {path: path.read_text(encoding="utf-8") for path in WORKFLOWS} == described


def test_the_shipped_workflows_are_numbered_without_a_gap():
    names = [path.stem.split("_") for path in WORKFLOWS]
    edits = [parts[2] for parts in names if parts[0] == "00" and len(parts) > 2]
    assert [parts[0] for parts in names] == ["00"] * len(edits) + [f"{i:02}" for i in range(len(names) - len(edits))]
    assert edits == [f"{i}" for i in range(1, len(edits) + 1)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_every_file_of_a_model_is_offered_for_download(path):
    """ComfyUI's page takes addresses of Hugging Face that end in .safetensors; the demo's files come with the pack."""
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        files = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
        entries = node["properties"].get("models", [])
        assert [entry["name"] for entry in entries] == ([] if is_demo(path.stem) else files)
        assert {entry["directory"] for entry in entries} <= {FOLDERS.get(node["type"])}
        for entry in entries:
            assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/\S+\.safetensors", entry["url"])


def test_what_names_a_template_names_one_that_there_is():
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("nodes/web/docs/*.md"), *WORKFLOWS]
    named = {name for page in pages for name in re.findall(r"\b\d\d_[a-z]\w+", page.read_text(encoding="utf-8"))}
    assert named and named - {path.stem for path in WORKFLOWS} == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_no_node_lies_on_another_or_out_of_its_group(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    boxes = {}
    for node in graph["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = box(left, top - TITLE, width, height + TITLE)
    groups = [box(*group["bounding"]) for group in graph["groups"]]
    for i, a in boxes.items():
        assert [j for j, b in boxes.items() if i < j and overlap(a, b)] == []
        around = [group for group in groups if overlap(a, group)]
        assert all(b[0] < a[0] and b[1] < a[1] and a[2] < b[2] and a[3] < b[3] for b in around)
    assert [(a, b) for a, b in combinations(groups, 2) if overlap(a, b)] == []


def box(left: int, top: int, width: int, height: int) -> tuple[int, int, int, int]:
    return left, top, left + width, top + height
