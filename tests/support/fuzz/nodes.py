"""The nodes, in a ComfyUI's own Python: its real classes, on a small checkpoint, without a server.

$COMFYUI_PATH names the ComfyUI; the folder has the small files of `host.tiny`.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .mutators import Mutant, Target
from .tensors import SAFETENSORS, Tensors, digest

PACK = Path(__file__).resolve().parents[3]
LORA = "mutant.safetensors"
NAMES = ("copy", "a/b", "../x", "/x", "C:x", "a\0b", "a\nb", ".x", "x" * 300, "a/../../x", "", " ", "\ud800", "a.ckpt")
INPUTS = ("icture", "mask", "factor", "utpaint")
SIDES = (0, 1, 7, 64)


def make_targets(folder: Path) -> dict[str, Target]:
    """The loader, the node that tells what is in a file, the one that copies it, and what takes pictures."""
    host = Path(os.environ["COMFYUI_PATH"])
    pack = _load_pack(host, folder)
    import comfy.sd

    checkpoint = str(folder / "checkpoints" / "tiny.safetensors")
    model = comfy.sd.load_checkpoint_guess_config(checkpoint, output_clip=False)[0]
    loras = folder / "loras"
    whole = [Tensors.read((loras / f"{name}.safetensors").read_bytes()) for name in ("kohya", "peft")]
    draw = lambda rng: SAFETENSORS.draw(rng, rng.choice(whole))  # noqa: E731
    names = (LORA, "pcm.recipe", "lora_adapter_metadata")

    def read(node: Any) -> Any:
        def work(mutant: Mutant) -> Any:
            (loras / LORA).write_bytes(mutant.data)
            return node()

        return work

    loader, info = pack.loader.PCMLoadLora, pack.info.PCMLoraInfo
    return {
        "node loader": Target(draw, read(lambda: _loaded(loader, model)), names, 3.0),
        "node info": Target(draw, read(lambda: _told(info.execute(LORA, model))), names, 2.0),
        "node stamp": Target(_draw_copy, lambda mutant: _copied(pack, mutant), ("name", "exists", "copied"), 0.5),
        "node pictures": Target(_draw_picture, lambda mutant: _edited(pack, mutant), INPUTS),
    }


def _load_pack(host: Path, folder: Path) -> SimpleNamespace:
    """This pack's node modules, imported as the host does."""
    sys.path.insert(0, str(host))
    sys.argv = ["main.py", "--cpu", "--disable-api-nodes", "--base-directory", str(folder)]
    os.chdir(host)
    import main  # noqa: F401, I001  the host's, and first: it reads the options; imported, it starts no server
    import folder_paths
    from server import PromptServer

    folder_paths.add_model_folder_path("loras", str(folder / "loras"), is_default=True)
    PromptServer.instance = SimpleNamespace(send_progress_text=lambda *_: None, client_id="fuzz")
    found = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules["pack"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(sys.modules["pack"])
    hidden = SimpleNamespace(unique_id="1", prompt={"1": {"class_type": "PCMLoadLora", "inputs": {}}})
    for node in importlib.import_module("pack.nodes").NODES:
        node.hidden = hidden
    modules = {name: importlib.import_module(f"pack.nodes.{name}") for name in ("loader", "info", "edit_parts")}
    return SimpleNamespace(**modules, recipe=importlib.import_module("pack.samplers").Recipe(family="sd15"))


def _told(output: Any) -> list[str]:
    """What a node says, but for the file's size."""
    return [re.sub(r", [\d.]+ MB", "", str(value)) for value in output.ui["text"]]


def _loaded(loader: Any, model: Any) -> Any:
    """What the node says, and a few of the weights with the LoRA on them."""
    import comfy.lora

    output = loader.execute(model, LORA, strength=1.0, recipe="auto", phases=4, mode="deterministic", cfg=1.0)
    patched, recipe = output.args
    weights = patched.model.state_dict()
    keys = sorted(patched.patches)
    found = {key: comfy.lora.calculate_weight(patched.patches[key], weights[key].clone(), key) for key in keys[:4]}
    return _told(output), str(recipe), len(keys), {key: digest(weight) for key, weight in found.items()}


def _draw_copy(rng: random.Random) -> Mutant:
    return Mutant(f"name {rng.choice(NAMES)!r:.30}", rng.choice(NAMES).encode("utf-8", "surrogatepass"), b"")


def _copied(pack: SimpleNamespace, mutant: Mutant) -> Any:
    name = mutant.data.decode("utf-8", "surrogatepass")
    pack.info.PCMStampRecipe.fingerprint_inputs("kohya.safetensors", name)
    return _told(pack.info.PCMStampRecipe.execute("kohya.safetensors", pack.recipe, name, True))


def _draw_picture(rng: random.Random) -> Mutant:
    """The data is a seed: pictures and masks come as tensors."""
    return Mutant("tensors", rng.randbytes(8), b"")


def _edited(pack: SimpleNamespace, mutant: Mutant) -> Any:
    """An operator node on pictures and masks of odd shapes and numbers; what it hands on must be finite."""
    rng = random.Random(mutant.data)
    node = rng.choice([n for n in vars(pack.edit_parts).values() if getattr(n, "KIND", None)])
    inputs = {"image": _tensor(rng, (1, 2), (3, 4, 1, 2, 0))}
    title = node.__name__
    if "Inpaint" in title:
        inputs |= {"mask": _tensor(rng, (1, 2, 3), ()), "grow": rng.choice((0, 8, 512, -1))}
    if "Outpaint" in title:
        inputs |= {side: rng.choice((0, 8, 64, -8)) for side in ("left", "top", "right", "bottom")} | {"grow": 8}
    if "Super" in title:
        inputs["factor"] = rng.choice((1, 2, 16, 0, -1))
    operator, start = node.execute(**inputs).args
    assert start.isfinite().all() and start.shape[-1] == 3
    result = operator.finish(operator.project(operator.start))
    assert result.isfinite().all()
    return tuple(start.shape)


def _tensor(rng: random.Random, batches: tuple[int, ...], channels: tuple[int, ...]) -> Any:
    import torch

    sides = [rng.choice((*SIDES, 32, 32)) for _ in range(2)] if rng.random() < 0.3 else [32, 32]
    batch, last = rng.choice(batches), [rng.choice((3, 3, 3, 3, 3, 4, 1, *channels))] if channels else []
    tensor = torch.rand(batch if rng.random() < 0.9 else 0, *sides, *last)
    kind = rng.choice(("", "", "", "nan", "inf", "large", "int", "half", "flat", "deep"))
    if kind in ("nan", "inf") and tensor.numel():
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(kind)
    tensor = tensor * 1e30 if kind == "large" else tensor
    tensor = {"int": tensor.int, "half": tensor.half, "flat": tensor.flatten, "deep": lambda: tensor[None]}.get(
        kind, lambda: tensor
    )()
    return tensor
