"""What Load PCM LoRA and ComfyUI's own loader make of LoRAs of every kind, on models of every kind.

    python -m host.lora_table

prints the table of docs/measurements/loras.md, in tests/. Needs a ComfyUI: $COMFYUI_PATH, else comfy-cli's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from host.graphs import loaded, sample
from host.helper_formats import FORMATS, GGUF
from host.lora_kinds import NAMES, NOT_IN_CORE, write_kinds
from host.server import Graph, Server, hosts, out, start
from host.tiny import make_checkpoint

CASTS = ("fp8_e4m3fn", "fp8_e5m2")  # how core's UNETLoader may keep a network's weights
BASES = ("tiny", *CASTS, *FORMATS, *GGUF)
SIDE = 16  # pixels of a picture, the fewest: it is the weights that are looked at


class Row(NamedTuple):
    """A file on a base: modules taken and held, as the node says; the largest difference of the latents of one step to
    core's (of `NOT_IN_CORE` to what the definition gives), and core's to those without a LoRA."""

    base: str
    kind: str
    taken: int
    held: int
    off: float
    effect: float


def packed(server: Server, models: Path) -> list[str]:
    """Write the tiny checkpoint in packed formats: the names of those that this host, or a pack beside ours, loads."""
    graph = Graph()
    node = graph.add("TestPacked", checkpoint=str(models / "checkpoints" / "tiny.safetensors"), folder=str(models))
    run = server.run(graph)
    assert run.error is None, run.error["exception_message"]
    has_gguf = "UnetLoaderGGUF" in server.get("/object_info")
    return [name for name in run.outputs[node]["formats"] if name in FORMATS or has_gguf]


def on_base(base: str) -> tuple[Graph, dict[str, list]]:
    """A graph with a model whose weights are of this type, and its links."""
    checkpoint = f"{base}.safetensors" if base in FORMATS else "tiny.safetensors"
    graph, links = loaded(f"{NAMES[0]}.safetensors", checkpoint)
    if base in CASTS:
        links["base"] = out(graph.add("UNETLoader", unet_name="tiny.safetensors", weight_dtype=base))
    if base in GGUF:
        links["base"] = out(graph.add("UnetLoaderGGUF", unet_name=f"{base}.gguf"))
    return graph, links


def rows(server: Server, base: str, strength: float = 1.0) -> list[Row]:
    """A row for every kind of LoRA on one base."""
    graph, links = on_base(base)
    links["latent"] = out(graph.add("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1))
    widgets = {"recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0, "strength": strength}
    nodes, loaders = [sample(graph, links | {"model": links["base"]}, steps=1)], []
    for name in NAMES:
        ours = graph.add("PCMLoadLora", model=links["base"], lora=f"{name}.safetensors", **widgets)
        if name in NOT_IN_CORE:
            core = graph.add("TestByHand", model=links["base"], lora=f"{name}.safetensors", strength=strength)
        else:
            file = f"{name}.core.safetensors"
            core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name=file, strength_model=strength)
        nodes += [sample(graph, links | {"model": out(node)}, steps=1) for node in (ours, core)]
        loaders.append(ours)
    run, (bare, *latents) = server.latents(graph, *nodes)
    measured = []
    for name, loader, ours, core in zip(NAMES, loaders, latents[::2], latents[1::2], strict=True):
        said = next(line for line in run.text(loader).splitlines() if "modules matched" in line)
        taken, held = map(int, said.split(", ")[1].split()[:3:2])
        off, effect = ((a - b).abs().max().item() for a, b in ((ours, core), (core, bare)))
        measured.append(Row(base, name, taken, held, off, effect))
    return measured


def markdown(table: list[Row]) -> str:
    """A line for each kind of file, a column for each base."""
    bases = list(dict.fromkeys(row.base for row in table))
    cells = {(row.kind, row.base): f"{row.taken} of {row.held}, {row.off:.2g}" for row in table}
    lines = [["file", *bases], ["---"] * (len(bases) + 1)]
    lines += [[name, *(cells[name, base] for base in bases)] for name in NAMES]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    if not hosts():
        sys.exit("No ComfyUI found: set COMFYUI_PATH to its folder.")
    with TemporaryDirectory() as place:
        models, base = Path(place, "models"), Path(place, "base")
        for folder in (base, *(models / kind for kind in ("checkpoints", "diffusion_models", "loras"))):
            folder.mkdir(parents=True)
        write_kinds(models / "loras", make_checkpoint(models / "checkpoints" / "tiny.safetensors"))
        (models / "diffusion_models" / "tiny.safetensors").symlink_to(models / "checkpoints" / "tiny.safetensors")
        server = start(hosts()[-1], base, models)
        try:
            known = ["tiny", *CASTS, *packed(server, models)]
            print(markdown([row for kind in known for row in rows(server, kind)]))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
