"""Which family a base is of, told from a name, a network's config, or weights under their original names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from phased_consistency.trainer.families import FAMILIES, family_of, load_base

UNET = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
INPUT = "model.diffusion_model.input_blocks.0.0.weight"
JOINT = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
UNET_CLASS = {"_class_name": "UNet2DConditionModel"}


def checkpoint(folder, **shapes):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "file.safetensors")
    return str(folder / "file.safetensors")


def test_bundled_bases_say_it_in_their_name():
    assert family_of("tiny-sd15") == "sd15"


@pytest.mark.parametrize(
    ("name", "shape", "family"), [(UNET, (320, 768), "sd15"), (UNET, (640, 2048), "sdxl"), (JOINT, (9, 3), "sd3")]
)
def test_single_files_say_it_in_their_weights(tmp_path, name, shape, family):
    path = checkpoint(tmp_path, **{name: shape})
    assert family_of(path) == family_of(path, chosen=family) == family


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({UNET: (8, 1024)}, "file.safetensors is SD2, of which no LoRA can be trained"),
        ({UNET: (8, 1280)}, "file.safetensors is an SDXL refiner"),
        ({UNET: (8, 768), INPUT: (8, 9, 3, 3)}, "file.safetensors is an SD1.5 inpainting model"),
        ({UNET: (8, 512)}, "Nothing in file.safetensors tells which family it is of"),
    ],
)
def test_other_single_files_are_refused(tmp_path, shapes, message):
    with pytest.raises(ValueError, match=message):
        load_base(checkpoint(tmp_path, **shapes))


def test_the_family_that_was_asked_for_counts_where_nothing_tells(tmp_path):
    assert family_of(checkpoint(tmp_path, **{UNET: (8, 512)}), chosen="sd15") == "sd15"
    with pytest.raises(ValueError, match="file.safetensors is SD3, base.family is sdxl. Set base.family=sd3"):
        family_of(checkpoint(tmp_path, **{JOINT: (9, 3)}), chosen="sdxl")


@pytest.mark.parametrize(
    ("part", "config", "family"),
    [
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "sd3"),
        ("unet", UNET_CLASS | {"addition_embed_type": "text_time", "cross_attention_dim": 2048}, "sdxl"),
        ("unet", UNET_CLASS | {"cross_attention_dim": 768}, "sd15"),
    ],
)
def test_folders_say_it_in_their_network(tmp_path, part, config, family):
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_text(json.dumps(config))
    assert family_of(str(tmp_path)) == family


def test_what_tells_nothing_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match=r"Nothing in .* tells which family it is of. Set base.family \(--family\)"):
        family_of(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No base at nowhere"):
        family_of("nowhere")
    with pytest.raises(FileNotFoundError, match="No file at gone.safetensors"):
        family_of("gone.safetensors")
    with pytest.raises(ValueError, match="Unknown base.family 'flux'; available: sd15"):
        load_base("tiny-sd15", family="flux")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_networks_config_is_known_without_building_it(family, tmp_path):
    """As diffusers fills in the defaults of what a config leaves out: of a full-size network, and of an odd one."""
    kind = FAMILIES[family]
    usual = json.loads((kind.configs / kind.component / "config.json").read_text())
    (tmp_path / kind.component).mkdir()
    few = {
        name: usual[name]
        for name in ("_class_name", "in_channels", "sample_size", "cross_attention_dim")
        if name in usual
    }
    for settings in (usual, few):
        (tmp_path / kind.component / "config.json").write_text(json.dumps(settings))
        config = kind.network_config(str(tmp_path), None)
        with torch.device("meta"):
            built = kind.network_class.from_config(settings).config
        public = {name: value for name, value in built.items() if not name.startswith("_")}  # others are its notes
        assert {name: config[name] for name in public} == public
        assert config.in_channels == built.in_channels
