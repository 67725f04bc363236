"""The rules of others for our files' headers, names and sidecars, one by one, of what every verb writes."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import header_text, read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.samplers.writing import MOST_HEADER
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.hashes import EMPTY_HASH
from phased_consistency.trainer.lora.write import export
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.sharing.extract import extract
from phased_consistency.trainer.sharing.merge import merge
from phased_consistency.trainer.sharing.pairs import MUST, usual_style
from phased_consistency.trainer.sharing.panels import LORA_MANAGER_PREVIEWS, LORA_MANAGER_REQUIRED
from phased_consistency.trainer.sharing.resize import resize
from phased_consistency.trainer.sharing.sidecars import sidecars
from phased_consistency.trainer.sharing.tag import tag
from support.bases import BUNDLED
from support.runs import TINY, small_config
from support.sharing_files import MODULES, kohya_file, pair_of, tuned_folder

FAMILIES = ("sd15", "sdxl", "sd3")
VERSIONS = {"sd15": "sd_1.5", "sdxl": "sdxl_base_v1-0", "sd3": "sd3_medium"}
ARCHITECTURES = {"sd15": "v1", "sdxl": "xl-v1-base", "sd3": "v3-medium"}
A1111 = {"sd15": "SD1", "sdxl": "SDXL", "sd3": "SD3"}
CIVITAI = {"sd15": "SD 1.5", "sdxl": "SDXL 1.0", "sd3": "SD 3"}
OURS = ("ss_", "sshs_", "modelspec.", "pcm.", "lora_adapter_metadata", "format")


def write(family, folder):
    """Verb -> the file that it wrote: a LoRA on every module, as training exports it, and what becomes of it."""
    base, out = load_base(BUNDLED[family]), lambda verb: folder / f"{family}-{verb}.safetensors"
    suffixes = tuple(f".{target}" for target in base.lora_targets)
    modules = {n: m for n, m in base.network.named_modules() if f".{n}".endswith(suffixes)}
    for number, name in enumerate(("export", "other")):
        torch.manual_seed(number)
        pairs = {name: pair_of(module.weight, 16) for name, module in modules.items()}
        weights = {f"{n}.lora_{half}": t for n, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}
        config = small_config(folder / "run", base__path=BUNDLED[family], lora__rank=16, lora__alpha=8, name=name)
        export(out(name), weights, config, base, step=3, samples=6)
    source = out("export")
    convert(source, foreign := out("foreign"), "diffusers" if family != "sd3" else "kohya")
    convert(foreign, out("convert"), usual_style(type(base)))
    merge([(source, 1.0), (out("other"), 0.5)], out("merge"))
    resize(source, out("resize"), rank=12)
    tag(source, {"modelspec.author": "me", "ss_training_comment": "x" * 50}, ["ss_seed"], out=out("tag"))
    return {verb: out(verb) for verb in ("export", "convert", "merge", "resize", "tag")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of every family and verb: its header, tensors and sidecars."""
    folder = tmp_path_factory.mktemp("rules")
    written = {(family, verb): file for family in FAMILIES for verb, file in write(family, folder).items()}
    tuned = tuned_folder(folder / "tuned", lambda unet: unet.get_submodule(MODULES[0]).weight.mul_(1.1))
    extract(TINY, str(tuned), extracted := folder / "extract.safetensors", rank=8)
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    return [read(file, *key) for key, file in (written | {("sd15", "extract"): extracted}).items()]


def read(file, family, verb):
    sidecars(file, file.parent / "grid.png")
    beside = [json.loads(file.with_suffix(suffix).read_text()) for suffix in (".json", ".metadata.json")]
    header = read_header(file)
    facts = {"file": file, "family": family, "verb": verb, "header": header, "metadata": header.metadata}
    return SimpleNamespace(**facts, tensors=load_file(file), a1111=beside[0], manager=beside[1])


def kohyas_legacy_hash(f):
    """None of files whose part at 1 MiB is empty."""
    data = save(f.tensors, {k: v for k, v in f.metadata.items() if k.startswith("ss_")})[0x100000:0x110000]
    return hashlib.sha256(data).hexdigest()[:8] if data else None


def alphas_are_kept(f):
    alphas = [f.tensors[module.keys["alpha"]].item() for module in f.header.modules.values() if "alpha" in module.keys]
    if f.family == "sd3":
        return not alphas
    return alphas == [32.0 if f.verb == "merge" else 8.0] * len(f.header.modules)


def usage_tips(f):
    text = f.manager["usage_tips"]
    return isinstance(text, str) and json.loads(text) == {"strength": f.a1111["preferred weight"]}


# the rule, of ModelSpec, sd-scripts, A1111, Lora-Manager or Civitai -> whether a file keeps it
RULES = {
    "sshs_model_hash is the SHA-256 of the tensors' bytes": lambda f: (
        f.metadata["sshs_model_hash"] == tensor_hash(f.file)
    ),
    "modelspec.hash_sha256 is that, after 0x": lambda f: (
        f.metadata["modelspec.hash_sha256"] == f"0x{f.metadata['sshs_model_hash']}"
    ),
    "the hash of nothing is in no header": lambda f: EMPTY_HASH[:8] not in " ".join(f.metadata.values()),
    "sshs_legacy_hash is kohya's, and is left out where it is of nothing": lambda f: (
        f.metadata.get("sshs_legacy_hash") == kohyas_legacy_hash(f)
    ),
    "ModelSpec's required entries are there": lambda f: all(f.metadata.get(key) for key in MUST),
    "modelspec.sai_model_spec is the version": lambda f: f.metadata["modelspec.sai_model_spec"] == "1.0.1",
    "modelspec.architecture is the registered id": lambda f: (
        f.metadata["modelspec.architecture"] == f"stable-diffusion-{ARCHITECTURES[f.family]}/lora"
    ),
    "modelspec.trigger_phrase is for no accelerator": lambda f: "modelspec.trigger_phrase" not in f.metadata,
    "modelspec.usage_hint is the recipe's sentence": lambda f: (
        f.metadata.get("modelspec.usage_hint")
        == (Recipe.from_header(f.metadata[HEADER_KEY]).usage_hint() if f.verb != "extract" else None)
    ),
    "ss_base_model_version is what A1111 and Lora-Manager look for": lambda f: (
        f.metadata["ss_base_model_version"] == VERSIONS[f.family]
    ),
    "ss_v2 is a word": lambda f: f.metadata["ss_v2"] == "False",
    "ss_network_module is kohya's": lambda f: f.metadata["ss_network_module"] == "networks.lora",
    "ss_network_dim is the rank": lambda f: (
        f.metadata["ss_network_dim"] in ("Dynamic", *(str(m.rank) for m in f.header.modules.values()))
    ),
    "ss_network_args is JSON with the convolutions' rank and alpha": lambda f: (
        json.loads(f.metadata["ss_network_args"]).keys() == {"conv_dim", "conv_alpha"}
    ),
    "ss_tag_frequency has no trigger words": lambda f: f.metadata["ss_tag_frequency"] == "{}",
    "no entry tells the time, so that equal runs give equal bytes": lambda f: (
        not {"modelspec.date", "ss_training_started_at", "ss_training_finished_at"} & f.metadata.keys()
    ),
    "no entry has another's name": lambda f: all(key.startswith(OURS) for key in f.metadata),
    "the header is one that ComfyUI reads": lambda f: len(header_text(f.file)) <= MOST_HEADER,
    "each module of kohya's style keeps its alpha; SD3's files have none": alphas_are_kept,
    "SD3's names are diffusers', others' kohya's": lambda f: all(
        name.startswith("transformer." if f.family == "sd3" else "lora_unet_") for name in f.tensors
    ),
    "A1111's sd version is one of its names": lambda f: f.a1111["sd version"] == A1111[f.family],
    "A1111's preferred weight is a number": lambda f: isinstance(f.a1111["preferred weight"], float),
    "A1111's activation text is none": lambda f: f.a1111["activation text"] == "",
    "Lora-Manager's required fields are there": lambda f: f.manager.keys() >= set(LORA_MANAGER_REQUIRED),
    "Lora-Manager's base_model is Civitai's label": lambda f: f.manager["base_model"] == CIVITAI[f.family],
    "Lora-Manager's usage_tips is JSON in a string": usage_tips,
    "Lora-Manager's file_name has no ending": lambda f: f.manager["file_name"] == f.file.stem,
    "no site's ids are forged": lambda f: (
        f.manager["from_civitai"] is False
        and "civitai" not in f.manager
        and not f.file.with_suffix(".civitai.info").exists()
    ),
    "the preview has a name that A1111 and Lora-Manager look for": lambda f: (
        f.file.with_suffix(".preview.png").is_file() and ".preview.png" in LORA_MANAGER_PREVIEWS
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(files, rule):
    assert {(f.family, f.verb) for f in files if not RULES[rule](f)} == set()


def test_the_files_are_of_both_kinds_of_legacy_hash(files):
    """Or that rule would say little."""
    assert {kohyas_legacy_hash(f) is None for f in files} == {True, False}
    assert len(files) == 16


def test_lora_managers_order_of_previews():
    order = (".webp", ".preview.webp", ".preview.png", ".preview.jpeg", ".preview.jpg", ".png")
    assert order == LORA_MANAGER_PREVIEWS


def test_a_header_that_cannot_follow_modelspec_does_not_claim_to(tmp_path, tiny_base):
    """The resolution of a file that says nothing is unknown."""
    bare = kohya_file(tmp_path / "bare.safetensors", tiny_base)
    convert(bare, out := tmp_path / "out.safetensors", "kohya")
    assert "modelspec.sai_model_spec" not in read_header(out).metadata
