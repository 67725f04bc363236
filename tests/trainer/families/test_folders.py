"""Bases as diffusers folders, here and from the hub: what is read of them, and what is said where something lacks."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from phased_consistency.samplers import VPSchedule
from phased_consistency.trainer.families import load_base, loading, look_at_base
from phased_consistency.trainer.families.prediction import found_in_scheduler
from support.bases import make_sdxl_folder
from support.runs import TINY

WEIGHED = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    return SimpleNamespace(folder=folder, parts=make_sdxl_folder(folder, tiny_base.tokenizers[0]))


@pytest.fixture
def folder(made, tmp_path):
    """A copy to change."""
    return shutil.copytree(made.folder, tmp_path / "folder")


def in_variant(folder, variant):
    """Rename every component's weights to a variant of theirs, as fp16-only bases have them."""
    for part in WEIGHED:
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Make the hub give the files of a folder that a download's patterns ask for, into another; what was asked."""

    def hub(source, target):
        requests = []

        def download(repo, allow_patterns, ignore_patterns=()):
            requests.append(allow_patterns)
            for file in (f for f in source.rglob("*") if f.is_file()):
                name = file.relative_to(source)
                if any(name.match(p) for p in allow_patterns) and not any(name.match(p) for p in ignore_patterns):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, target / name)
            return str(target)

        monkeypatch.setattr(loading, "snapshot_download", download)
        return requests

    return hub


@pytest.mark.parametrize(
    ("part", "kind"), [("unet", UNet2DConditionModel), ("text_encoder_2", CLIPTextModelWithProjection)]
)
def test_weights_are_loaded_in_the_wanted_precision(made, monkeypatch, part, kind):
    keywords = {}
    real = kind.from_pretrained

    def from_pretrained(*args, **options):
        keywords.update(options)
        return real(*args, **options)

    monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    model = loading.load_part(made.folder, part, kind, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.bfloat16 in keywords.values(), "not in fp32 first, which takes twice the memory"


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_weights_in_one_variant_alone_are_read(made, folder, variant):
    base, expected = load_base(str(in_variant(folder, variant))), load_base(str(made.folder))
    modules = zip(
        (base.network, base.vae, *base.text_encoders),
        (expected.network, expected.vae, *expected.text_encoders),
        strict=True,
    )
    for module, other in modules:
        assert all(torch.equal(w, other.state_dict()[name]) for name, w in module.state_dict().items())
    assert base.base_hash == expected.base_hash


def test_variants_beside_the_plain_weights_are_not_part_of_the_base(made, folder):
    before = loading.folder_hash(folder, WEIGHED)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for variant in ("fp16", "non_ema"):
        weights.with_suffix(f".{variant}.safetensors").write_bytes(b"another")
    assert loading.folder_hash(folder, WEIGHED) == before


@pytest.mark.parametrize(("variant", "number"), [(None, 1), ("fp16", 2), ("bf16", 3)])
def test_the_hub_is_asked_for_a_variant_where_there_is_no_other(folder, tmp_path, hub, variant, number):
    if variant:
        in_variant(folder, variant)
    requests = hub(folder, tmp_path / "cache")
    root = loading.diffusers_folder("owner/name", (*WEIGHED, "scheduler"), "SDXL")
    assert len(requests) == number
    assert all(loading.weight_files(root / part) for part in WEIGHED)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("a.fp16.safetensors", "a.bf16.safetensors"), ["a.fp16.safetensors"]),
        (("a.fp16-00001-of-00002.safetensors", "a.fp16-00002-of-00002.safetensors", "a.bf16.safetensors"), None),
        (("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "a.fp32.safetensors"), None),
        (("a.other.safetensors", "a.non_ema.safetensors"), ["a.other.safetensors"]),
    ],
)
def test_weights_of_one_variant_are_taken_together(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in loading.weight_files(tmp_path)] == (chosen or list(names[:2]))


def test_a_quantised_folder_is_refused_before_it_is_loaded(folder):
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    path.write_text(json.dumps(config))
    for read in (load_base, look_at_base):
        with pytest.raises(
            ValueError, match=r"unet holds quantised weights \(bitsandbytes\), .*Give the checkpoint in"
        ):
            read(str(folder))


def test_whole_numbers_of_a_scheduler_may_be_floats(tmp_path):
    path = tmp_path / "scheduler_config.json"
    config = json.loads((loading.CONFIGS / "sdxl" / "scheduler" / path.name).read_text())
    path.write_text(json.dumps(config | {"num_train_timesteps": 1000.0}))
    betas, _ = found_in_scheduler(path)
    assert VPSchedule.from_betas(**betas).network_time(torch.tensor([1000])) == 999


def test_a_gated_repository_says_how_to_get_in(monkeypatch):
    def download(*_, **__):
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None, status_code=403))

    monkeypatch.setattr(loading, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="licence at https://huggingface.co/owner/name and run hf auth login"):
        loading.diffusers_folder("owner/name", ("unet",), "SD1.5")


def test_a_folder_or_download_that_is_not_whole_is_named(folder, tmp_path, hub):
    for name in ("scheduler/scheduler_config.json", "vae/config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="is not whole: it lacks vae/config.json, scheduler/scheduler_config.json."):
        load_base(str(folder))
    hub(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match="owner/name is no diffusers folder of SDXL: it lacks scheduler/"):
        load_base("owner/name")
    shutil.copytree(loading.CONFIGS / "sdxl" / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="owner/name is not whole: it lacks vae/config.json. Get the base again"):
        load_base("owner/name")


def test_weights_of_another_kind_are_named(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="unet holds no weights in .safetensors, the only kind that is read"):
        load_base(str(folder))


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"model.ckpt is a zip archive or .*Set base.path to a .safe"):
        load_base(str(tmp_path / "model.ckpt"))


def test_a_tokenizer_folder_without_words_is_refused(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="which holds no tokenizer"):
        load_base(TINY, tokenizer=str(tmp_path))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_other_versions_of_transformers_are_read(made, folder, prefix):
    """Transformers 5 writes no prefix, 4 wants one and would fill the weights with random numbers."""
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    encoder = loading.load_part(folder, "text_encoder", CLIPTextModel, torch.float32)
    expected = made.parts.text_encoder.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in encoder.state_dict().items())


@pytest.mark.parametrize("shared", [True, False])
def test_a_text_encoder_that_lacks_weights_is_refused(folder, shared):
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    lacking = [name for name in tensors if name.endswith("fc1.weight") or not shared]
    save_file({name: t for name, t in tensors.items() if name not in lacking} or {"other": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"text_encoder lacks \d+ CLIPTextModel weights \(such as .*\). Get the file"):
        loading.load_part(folder, "text_encoder", CLIPTextModel, torch.float32)


@pytest.mark.parametrize(
    ("part", "beside", "words"),
    [
        ("unet", "SCB", "holds bitsandbytes int8 weights .*SCB"),
        ("text_encoder_2", "scale_weight", "holds scaled fp8 weights .*scale_weight"),
        ("unet", None, "holds integers for weights"),
        ("vae", None, "holds integers for weights"),
    ],
)
def test_quantised_weights_in_a_folder_are_refused_without_a_word_in_its_config(folder, part, beside, words):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
    tensors[name] = tensors[name].to(torch.int8)
    more = {f"{name.rpartition('.')[0]}.{beside}": torch.ones(2)} if beside else {}
    save_file(tensors | more, file)
    for verb in (look_at_base, load_base):
        with pytest.raises(ValueError, match=rf"{part}.*{words}.*base\.quantize makes"):
            verb(str(folder))


def test_positions_of_older_text_encoders_are_no_quantised_weights(folder):
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(file) | positions, file, {"format": "pt"})
    loading.check_weights(folder, WEIGHED)


@pytest.mark.parametrize("content", [b"<html>", b"version https://git-lfs.github.com/spec/v1"])
def test_what_stands_in_a_components_place_is_called_what_it_is(folder, content):
    (file,) = (folder / "vae").glob("*.safetensors")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"vae cannot be loaded: .*safetensors is a (web page|git-lfs pointer)"):
        look_at_base(str(folder))
