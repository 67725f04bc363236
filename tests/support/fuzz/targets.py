"""What reads files that people give us: each target draws a mutated one, and reads it as the program would."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_info import facts, noted, recipe_of, sentences
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.data.buckets import Buckets
from phased_consistency.trainer.data.cache import write_latents
from phased_consistency.trainer.data.decoding import aspect_of
from phased_consistency.trainer.data.folders import find_pictures
from phased_consistency.trainer.data.index import latents_name, write_index
from phased_consistency.trainer.data.shards import check_end, read_shard
from phased_consistency.trainer.data.store import LatentCache, prompts_name
from phased_consistency.trainer.families import Base, load_base
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.describe import describe, describe_text
from phased_consistency.trainer.lora.install import ADAPTER, load_for_check
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.sharing.read import read_lora
from phased_consistency.trainer.system.files import write_tensors
from phased_consistency.trainer.tiny.bundled import bundled_folder
from phased_consistency.trainer.training.checkpoint import load_latest_state, save_state
from support.bases import clip_config, make_vae
from support.ldm_checkpoint import save_single_file
from support.runs import TINY
from support.sharing_files import kohya_file

from .configs import OVERRIDES, TOML
from .mutators import DEEP, Mutant, Target, cut, flipped, other_file, spliced
from .pictures import PICTURES, TARS, saved
from .tensors import SAFETENSORS, Tensors, digest, odd, raw

FILE = "file.safetensors"
CONFIG = """\
name = "mine"
output = "out"
[base]
path = "tiny-sd15"
dtype = "fp32"
[data]
count = 6
resolution = 32
buckets = false
[lora]
rank = 4
alpha = 2.0
[objective]
name = "pcm"
points = 40
guidance = [3.0, 4.0]
[train]
steps = 4
lr = 1e-4
ema = 0.9
[preview]
every = 0
steps = [1, 2]
"""


def make_targets(folder: Path) -> dict[str, Target]:
    """Every target but the nodes, on small files made in this folder."""
    base = load_for_check(TINY)
    loras = lora_files(folder, base)
    draw = lambda rng: SAFETENSORS.draw(rng, rng.choice(loras))  # noqa: E731
    file = folder / FILE
    keys = (FILE, "pcm.recipe", "lora_adapter_metadata")
    lora = {"header": read_lora_header, "inspect": inspected, "check": partial(checked, base=base), "share": shared}
    targets = {name: Target(draw, written(file, read), keys, 2.0) for name, read in lora.items()}
    return targets | {
        "base file": base_file(folder, base),
        "base folder": base_folder(folder),
        "resume": resumed(folder),
        "cache": cached(folder),
        "config": configured(folder),
        "pictures": pictured(folder),
        "shards": archived(folder),
    }


def written(file: Path, read: Callable[[Path], Any]) -> Callable[[Mutant], Any]:
    """A reader of mutants from a reader of files."""

    def work(mutant: Mutant) -> Any:
        file.write_bytes(mutant.data)
        return read(file)

    return work


def lora_files(folder: Path, base: Base) -> list[Tensors]:
    """A LoRA on the tiny base in kohya's style, with alphas, and in diffusers', with the alpha in PEFT's metadata."""
    torch.manual_seed(0)
    kohya = kohya_file(folder / "kohya.safetensors", base)
    convert(kohya, folder / "peft.safetensors", "diffusers")
    return [Tensors.read(path.read_bytes()) for path in (kohya, folder / "peft.safetensors")]


def read_lora_header(file: Path) -> Any:
    header = read_header(file)
    modules = {name: (m.rank, m.shapes.get("up")) for name, m in sorted(header.modules.items())}
    assert header.kohya_names().keys() <= header.tensors.keys()
    told = facts(header)
    assert all(isinstance(line, str) for line in [*sentences(told), *noted(header.metadata)])
    return modules, header.family, sorted(header.unmatched), header.alphas(), recipe_of(header)


def inspected(file: Path) -> Any:
    told = describe(file)
    describe_text(told)
    json.dumps(told)
    return {k: v for k, v in told.items() if k not in ("bytes", "sha256", "autov3", "hash_matches_header", "metadata")}


def checked(file: Path, base: Base) -> Any:
    before = [(p, p.clone()) for p in base.network.parameters()]
    try:
        found = check_parity(file, base)
    finally:
        if ADAPTER in getattr(base.network, "peft_config", {}):
            base.network.delete_adapters(ADAPTER)
        for p, value in before:  # to which the LoRA was added by hand
            p.copy_(value)
    json.dumps(found, allow_nan=False)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if k != "text"}


def shared(file: Path) -> Any:
    lora = read_lora(file)
    return {name: (digest(p.down), digest(p.up), p.alpha) for name, p in lora.pairs.items()}, lora.recipe


def base_file(folder: Path, tiny: Base) -> Target:
    """A small SD1.5 in one file."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=8,
        sample_size=8,
    )
    text = CLIPTextModel(clip_config(tiny.tokenizers[0], width=768))
    parts = {"unet": unet, "vae": make_vae(levels=2), "text_encoder": text}
    configs = folder / "configs"
    for name in ("unet", "vae"):
        parts[name].save_config(configs / name)
    parts["text_encoder"].config.save_pretrained(configs / "text_encoder")
    shutil.copytree(SD15.configs / "scheduler", configs / "scheduler")
    tiny.tokenizers[0].save_pretrained(configs / "words")
    whole = Tensors.read(save_single_file(folder / "whole.safetensors", **parts, dtype=torch.float16).read_bytes())
    file = folder / "base.safetensors"

    def read(path: Path) -> Any:
        loaded = load_base(str(path), config=str(configs), tokenizer=str(configs / "words"))
        return loaded.prediction, loaded.null, [digest(p) for p in loaded.network.parameters()]

    return Target(lambda rng: SAFETENSORS.draw(rng, whole), written(file, read), ("base.safetensors", "base."), 0.6)


def base_folder(folder: Path) -> Target:
    """The tiny SD1.5 as a diffusers folder, of which one file is mutated."""
    place = folder / "folder"
    shutil.copytree(bundled_folder(TINY), place)
    files = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    files += ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json", "tokenizer/vocab.json")
    files += ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    contents = {name: (place / name).read_bytes() for name in files}

    def draw(rng: random.Random) -> Mutant:
        name = rng.choice(files)
        if name.endswith(".safetensors"):
            mutant = SAFETENSORS.draw(rng, Tensors.read(contents[name]))
        else:
            mutant = json_mutant(rng, contents[name])
        return mutant._replace(kind=f"{name}: {mutant.kind}")

    def read(mutant: Mutant) -> Any:
        name = mutant.kind.split(":")[0]
        (place / name).write_bytes(mutant.data)
        try:
            loaded = load_base(str(place))
            return loaded.prediction, [digest(p) for p in loaded.network.parameters()]
        finally:
            (place / name).write_bytes(contents[name])

    return Target(draw, read, (str(place), "base."), 0.6)


def json_mutant(rng: random.Random, data: bytes) -> Mutant:
    """A JSON file with one value changed, or none, or damage that befalls any file."""
    whole, kind = (
        data,
        rng.choice(("value_odd", "value_odd", "key_dropped", "nested_deep", "written_otherwise", "damaged")),
    )
    told = json.loads(data)
    key = rng.choice(list(told))
    if kind == "value_odd":
        data = raw(json.dumps(told | {key: odd(rng)})).encode()
    elif kind == "key_dropped":
        data = json.dumps({k: v for k, v in told.items() if k != key}).encode()
    elif kind == "nested_deep":
        data = rng.choice((b"[" * DEEP, b'{"a":' * DEEP))
    elif kind == "written_otherwise":
        data = json.dumps(told, indent=1, sort_keys=True).encode()
    else:
        data = rng.choice((cut, flipped, spliced))(rng, data) if rng.random() < 0.7 else other_file(rng)
    return Mutant(kind, data, whole, kind == "written_otherwise")


def resumed(folder: Path) -> Target:
    """A checkpoint of a run."""
    place = folder / "checkpoints"
    groups = {"adapter": {"a": torch.randn(4, 8), "b": torch.randn(8, 4)}, "optimizer": {"a/step": torch.tensor(3.0)}}
    path = save_state(place, 7, groups, {"samples": 70, "rng": [1, 2]}, keep=2)
    whole = Tensors.read(path.read_bytes())

    def read(_: Path) -> Any:
        step, tensors, told = load_latest_state(place)
        return step, told, {g: {n: digest(t) for n, t in named.items()} for g, named in tensors.items()}

    return Target(lambda rng: SAFETENSORS.draw(rng, whole), written(path, read), (path.name,))


def make_cache(place: Path) -> Path:
    """A cache's folder, of two files with three samples each."""
    for piece in range(2):
        tensors = {"mean.2x2": torch.randn(3, 3, 2, 2), "sizes": torch.full((3, 6), 16)}
        tensors["shape"] = torch.zeros(3, dtype=torch.int16)
        write_latents(place / latents_name(0, piece, piece == 1), tensors, ["2x2"], ["a", "b", "é"], [])
    write_index(place, None, False)
    write_tensors(place / prompts_name(0), {"hidden": torch.randn(4, 2, 3).half()}, {})
    return place


def cached(folder: Path) -> Target:
    """A cache of which one file is mutated."""
    place = folder / "cache"
    place.mkdir()
    make_cache(place)
    contents = {path.name: path.read_bytes() for path in place.iterdir()}

    def draw(rng: random.Random) -> Mutant:
        name = rng.choice(sorted(contents))
        mutant = SAFETENSORS.draw(rng, Tensors.read(contents[name]))
        return mutant._replace(kind=f"{name}: {mutant.kind}")

    def read(mutant: Mutant) -> Any:
        name = mutant.kind.split(":")[0]
        (place / name).write_bytes(mutant.data)
        try:
            cache = LatentCache(place)
            numbers = [int(n) for n in cache.buckets[0]]
            generators = [torch.Generator().manual_seed(n) for n in numbers]
            latents, captions = cache.latents(numbers, generators), list(cache.captions)
            encoded = {key: digest(tensor) for key, tensor in cache.encoding(captions).items()}
            return digest(latents), digest(cache.sizes(numbers)), captions, encoded
        finally:
            (place / name).write_bytes(contents[name])

    return Target(draw, read, (str(place),))


def configured(folder: Path) -> Target:
    """A configuration file and an override."""
    file = folder / "run.toml"

    def draw(rng: random.Random) -> Mutant:
        if rng.random() < 0.2:
            return Mutant("override " + rng.choice(OVERRIDES), CONFIG.encode(), CONFIG.encode())
        return TOML.draw(rng, CONFIG)

    def read(mutant: Mutant) -> Any:
        file.write_bytes(mutant.data)
        override = [mutant.kind.removeprefix("override ")] if mutant.kind.startswith("override ") else []
        config = load_config(str(file), override)
        config.notes(), config.grid(), config.run_folder, config.cache_folder
        json.dumps(config.what_decides_the_weights(), allow_nan=False)
        return config

    names = ("run.toml", "configuration has", "override", "preset", "Cannot set")
    return Target(draw, read, names, 2.0)


def picture_bytes() -> bytes:
    """A small picture, grained."""
    return saved(Image.effect_noise((40, 30), 50).convert("RGB"), "PNG")


def pictured(folder: Path) -> Target:
    """A folder with a picture and its caption, or a metadata.jsonl."""
    place = folder / "pictures"
    place.mkdir()
    kinds = [picture_bytes(), *(saved(Image.open(BytesIO(picture_bytes())), kind) for kind in ("JPEG", "WEBP"))]
    captions = [b"a red star"] * 6 + [b"\xff\xfe", b"", b"\0", b"x" * 10**6, b"\xef\xbb\xbfa"]
    lines = [b'{"file_name": "a.png", "text": "a"}', b'{"file_name": "a.png", "text": "\\ud800"}', b"[" * 10**5, b"5"]
    lines += [b'{"file_name": "../a.png", "text": "a"}', b'{"file_name": "\\u0000", "text": 5}', b"\xff\n", b"9" * 5000]

    def draw(rng: random.Random) -> Mutant:
        return PICTURES.draw(rng, kinds[0] if (mutant := rng.random()) < 0.5 else kinds[1 + (mutant < 0.75)])

    def read(mutant: Mutant) -> Any:
        rng = random.Random(mutant.data)
        (place / "a.png").write_bytes(mutant.data)
        (place / "a.txt").unlink(missing_ok=True)
        (place / "metadata.jsonl").unlink(missing_ok=True)
        if mutant.same or rng.random() < 0.8:
            (place / "a.txt").write_bytes(b"a" if mutant.same else rng.choice(captions))
        else:
            (place / "metadata.jsonl").write_bytes(rng.choice(lines))
        (picture,) = find_pictures(str(place), skip_bad=False)[0]
        picture.caption.encode()
        aspect_of(picture.path)
        return [loaded(picture, size) for size in (32, Buckets(((32, 48), (48, 32))))]

    return Target(draw, read, ("a.png", "metadata.jsonl", str(place)), 1.5)


def loaded(picture: Any, size: Any) -> str:
    """A picture's tensor, or, as the cache says it, what is wrong with it."""
    try:
        pixels, sizes = picture.load(size)
    except ValueError as error:
        raise ValueError(f"{picture.name}: {error}.") from error
    assert pixels.shape[0] == 3 and pixels.isfinite().all() and pixels.abs().max() <= 1
    return f"{digest(pixels)} {sizes.tolist()}"


def archived(folder: Path) -> Target:
    """A shard of two pictures."""
    file = folder / "set.tar"
    entries = [("a.png", picture_bytes()), ("a.txt", b"one"), ("b.png", picture_bytes()), ("b.txt", "é".encode())]

    def read(path: Path) -> Any:
        check_end(str(path))
        found = []
        for sample in read_shard(str(path)):
            sample.caption.encode()
            sample.name.encode()
            found.append((sample.caption, loaded(sample, 32)))
        return found

    return Target(lambda rng: TARS.draw(rng, entries), written(file, read), ("set.tar",))
