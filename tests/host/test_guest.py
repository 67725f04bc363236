"""A good guest: what the pack does to the host while it is loaded, interrupted, and when memory is wanted back."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from websocket import create_connection

from host.graphs import edit, loaded, picture, sample
from host.server import PACK, RUN_SECONDS, Graph, Server, environment, out, python_of
from host.test_compare import compare

HERE = Path(__file__).parent
HOSTS_OWN = (  # what the host and Python write down of any pack that they load
    *("nodes.NODE_CLASS_MAPPINGS", "nodes.NODE_DISPLAY_NAME_MAPPINGS", "nodes.EXTENSION_WEB_DIRS"),
    *("nodes.LOADED_MODULE_DIRS", "folder_paths.filename_list_cache", "sys.modules", "sys.path_importer_cache"),
    *("re._cache", "encodings._cache", "linecache.cache", "pydantic_settings.sources.providers.toml.tomllib"),
)
RUDE = {  # what a pack should not do -> under which name it must be found
    "comfy.samplers.KSampler.SAMPLERS.append('rude')": "comfy.samplers.KSampler.SAMPLERS length",
    "comfy.samplers.SCHEDULER_HANDLERS['rude'] = None": "comfy.samplers.SCHEDULER_HANDLERS['rude']",
    "comfy.k_diffusion.sampling.sample_rude = print": "comfy.k_diffusion.sampling.sample_rude",
    "folder_paths.folder_names_and_paths['loras'][0].append('rude')": (
        "folder_paths.folder_names_and_paths['loras'][0] length"
    ),
    "nodes.NODE_CLASS_MAPPINGS['KSampler'] = None": "nodes.NODE_CLASS_MAPPINGS['KSampler']",
    "comfy.model_patcher.ModelPatcher.clone = None": "comfy.model_patcher.ModelPatcher.clone",
    "comfy.model_management.unload_all_models = print": "comfy.model_management.unload_all_models",
    "comfy.cli_args.args.rude = 1": "comfy.cli_args.args['rude']",
    "sys.path.append('rude')": "sys.path length",
    "warnings.filterwarnings('ignore', 'rude')": "warnings.filters length",
    "logging.root.addHandler(logging.NullHandler())": "process root",
    "torch.set_num_threads(3)": "torch threads",
    "torch.manual_seed(1)": "torch random",
    "os.environ['RUDE'] = '1'": "process RUDE",
}
IMPORTS = (
    "comfy.cli_args, comfy.k_diffusion.sampling, comfy.model_patcher, comfy.samplers, folder_paths, logging, nodes"
)


@pytest.fixture(scope="module")
def loads(server, tmp_path_factory):
    """What `guest.py` reports of the pack and of a rude one, by name."""
    base = tmp_path_factory.mktemp("guest")
    packs = base / "custom_nodes"
    (packs / "rude").mkdir(parents=True)
    (packs / "phased-consistency").symlink_to(PACK, target_is_directory=True)
    lines = [f"import {IMPORTS}, logging, os, sys, torch, warnings, xml.dom.minidom", *RUDE, "NODE_CLASS_MAPPINGS = {}"]
    lines += ["open(__file__ + '.txt', 'w').close()", "import socket; socket.socket().close()"]
    (packs / "rude" / "__init__.py").write_text("\n".join(lines))
    command = [python_of(server.folder), str(HERE / "guest.py"), str(server.folder), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=RUN_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def of_the_host(names: list[str]) -> list[str]:
    """Those that are not its notes of a pack, as `PCM...` and the pack's own modules are."""
    core = [name for name in names if name.startswith("nodes.NODE_") and "['" in name and "['PCM" not in name]
    return core + [name for name in names if not name.startswith(HOSTS_OWN)]


def test_loading_the_pack_changes_nothing_of_the_host(loads):
    assert of_the_host(loads["phased-consistency"]["changed"]) == []


def test_no_library_is_imported_for_the_pack(loads):
    others = [name for name in loads["phased-consistency"]["modules"] if name.split(".")[0] != "tomllib"]
    assert others == [], "tomllib is the host's, which reads pyproject.toml"


def test_no_file_is_opened_and_nothing_is_started(loads):
    work = [line for line in loads["phased-consistency"]["work"] if not line.endswith("pyproject.toml")]
    assert work == [], "the host reads pyproject.toml"


def test_it_loads_in_no_time(loads):
    """The best of several, each as if it was the first: other programs on the machine only ever add to it."""
    assert min(loads["phased-consistency"]["seconds"]) < 0.15


def test_it_has_the_entry_point_of_v3_alone(loads):
    names = loads["phased-consistency"]["names"]
    assert "comfy_entrypoint" in names
    assert "NODE_CLASS_MAPPINGS" not in names and "NODE_DISPLAY_NAME_MAPPINGS" not in names


def test_a_rude_pack_would_be_noticed(loads):
    report = loads["rude"]
    assert [name for name in RUDE.values() if name not in of_the_host(report["changed"])] == []
    assert "xml.dom.minidom" in report["modules"]
    assert any(line.endswith("__init__.py.txt") for line in report["work"]) and "socket.__new__" in report["work"]
    assert "NODE_CLASS_MAPPINGS" in report["names"]


def watched_until(server: Server, graph: Graph, event: str, node: str) -> str:
    """Queue a graph, and wait until the host reports this of a node; returns the prompt's id."""
    client = uuid.uuid4().hex
    with closing(
        create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={client}", timeout=RUN_SECONDS)
    ) as socket:
        prompt = server.queue(graph, client)
        while True:
            message = socket.recv()
            event_data = json.loads(message) if isinstance(message, str) else {"type": "", "data": {}}
            assert event_data["type"] not in ("execution_success", "execution_error"), (
                "it ended before it was interrupted"
            )
            if event_data["type"] == event and event_data["data"]["node"] == node:
                return prompt


def fresh(graph: Graph, links: dict[str, list]) -> dict[str, list]:
    """The links with a model that no run has met, so that nothing after it comes from the host's cache."""
    counted = graph.add("TestCount", model=links["model"], name=uuid.uuid4().hex, stop_at=0)
    base = graph.add("TestCount", model=links["base"], name=uuid.uuid4().hex, stop_at=0)
    return {**links, "model": out(counted), "base": out(base)}


def sampled(graph: Graph, links: dict[str, list], steps: int) -> str:
    return sample(graph, links, steps=steps)


def compared(graph: Graph, links: dict[str, list], steps: int) -> str:
    return compare(graph, links, step_counts=f"{steps}, 1")


def inpainted(graph: Graph, links: dict[str, list], steps: int) -> str:
    return edit(graph, links, "Inpaint", **picture(graph, 64, 64), steps=steps)


def core(graph: Graph, links: dict[str, list]) -> str:
    """Core's sampler on the bare checkpoint, of which nothing may be left patched."""
    prompts = {k: links[k] for k in ("positive", "negative")} | {"latent_image": links["latent"]}
    widgets = {"seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return graph.add("KSampler", model=links["base"], **prompts, **widgets)


@pytest.mark.parametrize("make", [sampled, compared, inpainted], ids=lambda make: make.__name__)
def test_an_interrupt_leaves_no_trace(server, make: Callable[[Graph, dict[str, list], int], str]):
    """Through the button, in a run long enough for it: then the same node makes what it made before, and the checkpoint
    is as it was."""
    pictures = []
    for interrupted in (False, True):
        graph, links = loaded()
        if interrupted:
            links = fresh(graph, links)
            node = make(graph, links, 16)
            graph.add("TestTensor", value=out(node), name="none")
            prompt = watched_until(server, graph, "progress", node)
            server.post("/interrupt")
            server.wait(prompt)
            messages = [kind for kind, _ in server.get(f"/history/{prompt}")[prompt]["status"]["messages"]]
            assert "execution_interrupted" in messages
            graph, links = loaded()
        links = fresh(graph, links)
        bare = core(graph, links)
        pictures.append(server.tensors(graph, out(bare), out(make(graph, links, 4)))[1])
    before, after = pictures
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(*(each.flatten()[:4] for each in before))


def test_memory_is_given_back_and_the_same_graph_runs_again(server):
    """Free models and caches: no network is alive then, whatever the nodes have seen, and the pictures are the same."""
    pictures = []
    for _ in range(2):
        graph, links = loaded()
        scheduled = graph.add("PCMCFGSchedule", model=links["model"], recipe=links["recipe"], cfg=1.5, steps=0)
        graph[scheduled]["inputs"] |= {"from_step": 1, "to_step": 1}
        nodes = [sample(graph, {**links, "model": out(scheduled)}), edit(graph, links, "Inpaint", **picture(graph))]
        nodes += [compare(graph, links), core(graph, links)]
        here = graph.add("TestAlive", name=uuid.uuid4().hex, after=out(nodes[0]))
        run, tensors = server.tensors(graph, *map(out, nodes))
        pictures.append(tensors)
        assert run.outputs[here]["alive"][0] > 0
        server.post("/free", unload_models=True, free_memory=True)
        assert 0 in (alive(server) for _ in range(3)), "the host may take up a graph before it gives back"
    assert all(torch.equal(a, b) for a, b in zip(*pictures, strict=True))


def alive(server: Server) -> int:
    """How many of the host's networks are in memory."""
    graph = Graph()
    node = graph.add("TestAlive", name=uuid.uuid4().hex)
    return server.run(graph).outputs[node]["alive"][0]
