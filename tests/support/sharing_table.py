"""What diffusers and ComfyUI make of the files that the sharing verbs write, against what they were meant to add.

    python -m support.sharing_table

prints a table for random bases of all families, LoRAs on every module that the trainer adapts, and every verb.
docs/measurements/sharing.md has it. Needs a ComfyUI: $COMFYUI_PATH, else comfy-cli's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from host.server import HERE, environment, hosts, python_of
from host.test_trained import pipeline
from phased_consistency.samplers import Recipe
from phased_consistency.trainer.families import Base
from phased_consistency.trainer.lora.install import ADAPTER, install_by_diffusers, load_for_check
from phased_consistency.trainer.lora.pair import Pair
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.sharing.extract import extract
from phased_consistency.trainer.sharing.merge import merge
from phased_consistency.trainer.sharing.pairs import STYLES, usual_style, write_lora
from phased_consistency.trainer.sharing.resize import resize
from phased_consistency.trainer.sharing.tag import tag
from phased_consistency.trainer.tiny.single_file import sd3_transformer
from support.ldm_checkpoint import ldm_unet
from support.sharing_files import pair_of

KINDS = ("sd15", "sdxl", "sd3")
Deltas = dict[str, torch.Tensor]  # module -> what is to be added, (out, in * kernel) in fp64
COLUMNS = ("base", "verb", "error stated", "diffusers: unmatched", "error", "ComfyUI: unmatched", "error", "greatest")


class Made(NamedTuple):
    """A file, the verb that made it, the relative error that the verb stated, and what the file was meant to add."""

    verb: str
    file: Path
    stated: float
    meant: Deltas


class Row(NamedTuple):
    """Of one file: modules or tensors unmatched, |added - meant| / |meant|, and the greatest difference of a weight."""

    kind: str
    verb: str
    stated: float
    diffusers_unmatched: int
    diffusers_error: float
    host_unmatched: int
    host_error: float
    host_difference: float


def table(folder: Path, host: Path) -> list[Row]:
    """Of all families, made in this folder."""
    made = {kind: make(kind, folder / kind) for kind in KINDS}
    mine = [(kind, each, by_diffusers(base, each)) for kind, (base, files) in made.items() for each in files]
    theirs = by_host(host, [question(*each) for each in made.values()])
    return [
        Row(kind, each.verb, each.stated, *loaded, len(said["unmatched"]), said["error"], said["difference"])
        for (kind, each, loaded), said in zip(mine, theirs, strict=True)
    ]


def make(kind: str, folder: Path) -> tuple[Base, list[Made]]:
    """A random base, and what every verb makes of random LoRAs on it."""
    pipe = pipeline(kind)
    pipe.save_pretrained(folder / "base")
    base = load_for_check(str(folder / "base"), family=kind)
    family, style = type(base), usual_style(type(base))
    (unusual,) = set(STYLES) - {style}
    first, second = random_lora(base, 8, 4.0), random_lora(base, 4, 4.0)
    # SD3's files hold no alpha but the rank: only converting works another in
    plain = first if family.stores_alpha else random_lora(base, 8, 8.0)
    recipe = Recipe(family=kind, **({"prediction": "flow", "shift": 3.0, "points": 100} if kind == "sd3" else {}))
    foreign, one, two = (folder / f"{name}.safetensors" for name in ("foreign", "one", "two"))
    for path, pairs, written in ((foreign, first, unusual), (one, plain, style), (two, second, style)):
        write_lora(path, family, pairs, {}, recipe, written)
    tuned = tune(pipe, base, folder / "tuned")
    both = [(one, 1.0), (two, 0.7)]
    meant, other = added(plain), added(second)
    converted = meant if plain is first else added(first)
    total = {name: delta + 0.7 * other[name] for name, delta in meant.items()}
    runs = {
        f"convert --to {style}": (converted, lambda out: convert(foreign, out, style)),
        "tag": (meant, lambda out: tag(one, {"modelspec.author": "me", "ss_seed": "2"}, out=out)),
        "merge": (total, lambda out: merge(both, out)),
        "merge --rank 6": (total, lambda out: merge(both, out, rank=6)),
        "resize --rank 4": (meant, lambda out: resize(one, out, rank=4)),
        "extract --rank 4": (tuned, lambda out: extract(base.path, str(folder / "tuned"), out, rank=4)),
    }
    made = []
    for number, (verb, (wanted, run)) in enumerate(runs.items()):
        told = run(file := folder / f"{number}.safetensors")
        made.append(Made(verb, file, told.get("error", 0.0), wanted))
    return base, made


def random_lora(base: Base, rank: int, alpha: float) -> dict[str, Pair]:
    """On every module that the trainer adapts, in fp16."""
    suffixes = tuple(f".{target}" for target in base.lora_targets)
    names = [name for name, _ in base.network.named_modules() if f".{name}".endswith(suffixes)]
    found = {name: pair_of(base.network.get_submodule(name).weight, rank, 0.05) for name in names}
    return {f"{base.component}.{name}": Pair(down.half(), up.half(), alpha) for name, (down, up) in found.items()}


def added(pairs: dict[str, Pair]) -> Deltas:
    return {n: p.scale * p.up.flatten(1).double() @ p.down.flatten(1).double() for n, p in pairs.items()}


def tune(pipe: DiffusionPipeline, base: Base, folder: Path) -> Deltas:
    """Write the pipeline with changes of rank 8 in every module; returns them as fp32 has them."""
    network, changes = getattr(pipe, base.component), {}
    for name, delta in added(random_lora(base, 8, 8.0)).items():
        weight = network.get_submodule(name.split(".", 1)[1]).weight
        before = weight.detach().clone()
        weight.data += delta.view_as(weight)
        changes[name] = (weight.detach() - before).flatten(1).double()
    pipe.save_pretrained(folder)
    return changes


def by_diffusers(base: Base, made: Made) -> tuple[int, float]:
    """(modules that it did not load, the relative error of what it adds)."""
    _, unmatched = install_by_diffusers(made.file, base, ADAPTER)
    wrong = 0.0
    for name, delta in made.meant.items():
        layer = base.network.get_submodule(name.split(".", 1)[1])
        found = layer.get_delta_weight(ADAPTER).detach() if ADAPTER in getattr(layer, "lora_A", ()) else 0 * delta
        wrong += (found.flatten(1).double() - delta).square().sum().item()
    base.network.delete_adapters(ADAPTER)
    return unmatched, (wrong / sum(delta.square().sum().item() for delta in made.meant.values())) ** 0.5


def question(base: Base, made: list[Made]) -> dict:
    """For host/lora_effect.py: the network, and each file with what it was meant to add, under the host's names."""
    folder, network = made[0].file.parent, type(base.network).from_config(base.network.config)
    network.load_state_dict({k.replace("base_layer.", ""): v for k, v in base.network.state_dict().items()})
    save_in_hosts_names(network, weights := folder / "weights.safetensors")
    files, meant = [], {}  # several files are meant to add the same
    for each in made:
        if (path := meant.get(id(each.meant))) is None:
            path = meant[id(each.meant)] = each.file.with_suffix(".meant.safetensors")
            fill(network, base.component, each.meant)
            save_in_hosts_names(network, path)
        files.append((str(each.file), str(path)))
    return {"weights": str(weights), "loras": files}


def fill(network: torch.nn.Module, component: str, deltas: Deltas) -> None:
    """Put what is added in the place of the weights."""
    for name, weight in network.state_dict().items():
        delta = deltas.get(f"{component}.{name.removesuffix('.weight')}")
        weight.copy_(0 if delta is None else delta.view_as(weight))


def by_host(host: Path, questions: list[dict]) -> list[dict]:
    """What host/lora_effect.py says of each file."""
    command = [python_of(host), str(HERE / "lora_effect.py"), str(host)]
    options = {"capture_output": True, "text": True, "timeout": 240, "cwd": host, "env": environment()}
    run = subprocess.run(command, input=json.dumps(questions), **options)
    assert run.returncode == 0, run.stderr[-2000:]
    return [found for each in json.loads(run.stdout) for found in each]


def save_in_hosts_names(network: torch.nn.Module, path: Path) -> None:
    """The weights, or what is added to them: names change, and rows go to other places."""
    named = sd3_transformer(network.state_dict()) if hasattr(network, "transformer_blocks") else ldm_unet(network)
    save_file({name: weight.contiguous() for name, weight in named.items()}, path)


def markdown(rows: list[Row]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[f"{value:.2g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    if not hosts():
        sys.exit("No ComfyUI found: set COMFYUI_PATH to its folder.")
    with TemporaryDirectory() as place:
        print(markdown(table(Path(place), hosts()[-1])))
