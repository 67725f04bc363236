"""LoRA files of every published key style, whole and damaged, and their names against diffusers' own conversion."""

import hashlib
import json
import pickle
import struct
import zipfile

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.families import base_title, family_title
from phased_consistency.samplers.lora_file import file_hash, read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY

ATTENTION = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": (8, 768),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (8, 8),
}
MODULES = ATTENTION | {
    "mid_block.attentions.0.proj_in": (8, 8),
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (16, 8),
    "down_blocks.0.resnets.0.time_emb_proj": (8, 16),
}
KOHYA = {"lora_unet_" + name.replace(".", "_") for name in MODULES}
STYLES = {
    "{m}.lora_A.weight": "{m}.lora_B.weight",
    "unet.{m}.lora_A.weight": "unet.{m}.lora_B.weight",
    "unet.{m}.lora_A.default.weight": "unet.{m}.lora_B.default.weight",
    "unet.{m}.lora.down.weight": "unet.{m}.lora.up.weight",
    "unet.{m}.lora_linear_layer.down.weight": "unet.{m}.lora_linear_layer.up.weight",
    "base_model.model.{m}.lora_A.weight": "base_model.model.{m}.lora_B.weight",
    "unet.base_model.model.{m}.lora_A.weight": "unet.base_model.model.{m}.lora_B.weight",
    "base_model.model.unet.{m}.lora_A.weight": "base_model.model.unet.{m}.lora_B.weight",
    "lora_unet_{k}.lora_down.weight": "lora_unet_{k}.lora_up.weight",
    "lycoris_{k}.lora_down.weight": "lycoris_{k}.lora_up.weight",
}
# of examples/dreambooth before PEFT: unet.*.attn2.processor.to_k_lora.down.weight, and to_out without its ".0"
PROCESSOR = ("unet.{p}.processor.{q}_lora.down.weight", "unet.{p}.processor.{q}_lora.up.weight")
# fmt: off
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]
# fmt: on


def lora(modules=MODULES, down="lora_unet_{k}.lora_down.weight", up="lora_unet_{k}.lora_up.weight", rank=4):
    """Random LoRA tensors for modules of weight shape (out, in), in one key style."""
    tensors = {}
    for name, (n_out, n_in) in modules.items():
        parent, _, last = name.removesuffix(".0").rpartition(".") if "to_out" in name else name.rpartition(".")
        parts = {"m": name, "k": name.replace(".", "_"), "p": parent, "q": last}
        tensors[down.format(**parts)] = torch.randn(rank, n_in)
        tensors[up.format(**parts)] = torch.randn(n_out, rank)
    return tensors


@pytest.mark.parametrize(("down", "up"), STYLES.items())
def test_every_key_style_gives_the_same_modules(write, down, up):
    header = read_header(write(lora(down=down, up=up)))
    assert set(header.modules) == KOHYA
    assert header.unmatched == []
    assert header.family == "sd15"
    for name, shape in MODULES.items():
        module = header.modules["lora_unet_" + name.replace(".", "_")]
        assert module.rank == 4 and module.fits(shape) and not module.fits((shape[0] + 1, shape[1]))


def test_old_processor_style_gives_the_same_modules(write):
    header = read_header(write(lora(ATTENTION, *PROCESSOR)))
    assert set(header.modules) == {"lora_unet_" + name.replace(".", "_") for name in ATTENTION}


@pytest.mark.parametrize("style", ["unet.{m}.lora.down.weight", "unet.{m}.lora_A.weight"])
def test_to_out_without_its_index(write, style):
    up = STYLES[style]
    header = read_header(write(lora({"mid_block.attn1.to_out": (8, 8)}, style, up)))
    assert list(header.modules) == ["lora_unet_mid_block_attn1_to_out_0"]


def test_kohya_names_keep_every_tensor(write):
    tensors = lora(down="unet.{m}.lora_A.weight", up="unet.{m}.lora_B.weight")
    names = read_header(write(tensors)).kohya_names()
    assert set(names) == set(tensors)
    assert set(names.values()) == set(lora())


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("transformer.{m}.lora_A.weight", "transformer.{m}.lora_B.weight"),
        ("base_model.model.{m}.lora_A.weight", "base_model.model.{m}.lora_B.weight"),
        ("{m}.lora_A.weight", "{m}.lora_B.weight"),
        ("lora_transformer_{k}.lora_down.weight", "lora_transformer_{k}.lora_up.weight"),
        ("lycoris_{k}.lora_down.weight", "lycoris_{k}.lora_up.weight"),
    ],
)
def test_sd3_in_every_key_style(write, down, up):
    modules = {"transformer_blocks.0.attn.to_k": (1536, 1536), "transformer_blocks.0.attn.add_k_proj": (1536, 1536)}
    header = read_header(write(lora(modules, down, up)))
    assert set(header.modules) == {"lora_transformer_" + name.replace(".", "_") for name in modules}
    assert header.family == "sd3"


@pytest.mark.parametrize(
    ("name", "kohya"),
    [
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ],
)
def test_text_encoders_keep_their_own_names(write, name, kohya):
    header = read_header(write(lora({name: (8, 8)}, "{m}.lora_A.weight", "{m}.lora_B.weight")))
    assert list(header.modules) == [kohya]


def test_ldm_names_are_left_alone(write):
    header = read_header(write(lora({"input_blocks.1.1.transformer_blocks.0.attn2.to_k": (8, 2048)})))
    assert list(header.modules) == ["lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"]
    assert header.family == "sdxl"


def test_convolutions_fit(write):
    down, up = torch.randn(4, 3, 3, 3), torch.randn(8, 4, 1, 1)
    header = read_header(write({"lora_unet_conv1.lora_down.weight": down, "lora_unet_conv1.lora_up.weight": up}))
    (module,) = header.modules.values()
    assert module.rank == 4 and module.fits((8, 3, 3, 3)) and not module.fits((8, 3, 1, 1))


def test_half_a_module_fits_nothing(write):
    header = read_header(write({"lora_unet_conv_in.lora_down.weight": torch.randn(4, 8)}))
    assert not header.modules["lora_unet_conv_in"].fits((8, 8))


def test_alpha_tensors_belong_to_their_module(write):
    alphas = {f"{name}.alpha": torch.tensor(2.0) for name in KOHYA}
    header = read_header(write(lora() | alphas))
    assert all(set(m.keys) == {"down", "up", "alpha"} for m in header.modules.values())
    assert header.scale_alphas() == {}


def test_alphas_in_peft_metadata(write):
    """diffusers writes alpha into the header alone, with one value for most modules and a pattern for some."""
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 2}}
    tensors = lora(down="unet.{m}.lora_A.weight", up="unet.{m}.lora_B.weight")
    tensors["unet.mid_block.attentions.0.proj_in.alpha"] = torch.tensor(1.0)
    header = read_header(write(tensors, {"lora_adapter_metadata": json.dumps(config)}))
    alphas = header.scale_alphas()
    assert alphas.pop("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k") == 2
    assert set(alphas) < KOHYA and "lora_unet_mid_block_attentions_0_proj_in" not in alphas
    assert set(alphas.values()) == {8}


def test_no_metadata_no_alphas(write):
    assert read_header(write(lora())).scale_alphas() == {}


@pytest.mark.parametrize(("width", "family"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl"), (4096, None)])
def test_family_by_width(write, width, family):
    assert read_header(write(lora({"mid_block.attn2.to_k": (8, width)}))).family == family


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("joint_blocks.3.x_block.attn.qkv", "sd3"),
        ("joint_blocks.3.context_block.attn.qkv", "sd3"),
        ("joint_blocks.3.x_block.attn2.qkv", "sd3"),
        ("joint_blocks.37.x_block.mlp.fc1", "sd3"),
        ("joint_blocks.0.context_block.adaLN_modulation.1", "sd3"),
        ("joint_blocks.0.x_block.attn.proj", "sd3"),
        ("joint_blocks.0.attn.qkv", None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_sd3_in_stabilitys_layout(write, prefix, module, family):
    """Whichever of its modules are trained."""
    assert read_header(write(lora({f"{prefix}{module}": (4608, 1536)}))).family == family


def test_flux_is_not_sd3(write):
    modules = {"transformer_blocks.0.attn.to_k": (3072, 3072), "transformer_blocks.0.attn.add_k_proj": (3072, 3072)}
    assert (
        read_header(write(lora(modules, "transformer.{m}.lora_A.weight", "transformer.{m}.lora_B.weight"))).family
        is None
    )


@pytest.mark.parametrize(
    ("name", "width"),
    [("transformer.transformer_blocks.0.attn2.to_k", 2048), ("transformer.blocks.0.attn2.to_k", 1024)],
)
def test_other_transformers_are_no_unet(write, name, width):
    """LTX-Video and HunyuanDiT have cross-attention as wide as SDXL's and SD2's."""
    assert read_header(write(lora({name: (8, width)}, "{m}.lora_A.weight", "{m}.lora_B.weight"))).family is None


def test_sd35_medium_has_a_second_attention(write):
    modules = {"transformer_blocks.0.attn2.to_k": (1536, 1536), "transformer_blocks.0.attn.to_k": (1536, 1536)}
    header = read_header(write(lora(modules, "transformer.{m}.lora_A.weight", "transformer.{m}.lora_B.weight")))
    assert set(header.modules) == {"lora_transformer_" + name.replace(".", "_") for name in modules}
    assert header.family == "sd3"


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({HEADER_KEY: Recipe(family="sdxl").to_header()}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd15"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-3-medium"}, "sd3"),
        ({"ss_base_model_version": "sd_v1"}, "sd15"),
        ({"ss_base_model_version": "sd_2.1"}, "sd2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sd3-m"}, "sd3"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"ss_base_model_version": "flux2_klein_4b"}, "flux2"),
        ({"modelspec.architecture": "Flux.2-dev/lora"}, "flux2"),
        ({"modelspec.architecture": "chroma/lora"}, "chroma"),
        ({"modelspec.architecture": "Qwen-Image-Edit/lora"}, "qwen_image"),
        ({"ss_base_model_version": "zimage"}, "lumina2"),
        ({"ss_base_model_version": "wan_2.2_14b"}, "wan2.1"),
        ({"modelspec.architecture": "hunyuan-video/lora"}, "hunyuan_video"),
        ({"modelspec.architecture": "anima-preview/lora"}, "anima"),
        ({"ss_base_model_version": "animagine"}, None),
        ({"ss_base_model_version": "fluxonic"}, None),
        # an entry that tells nothing leaves it to the next
        ({"modelspec.architecture": "lora", "ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (None, None),
    ],
)
def test_family_by_metadata(write, metadata, family):
    """Where no tensor tells: this LoRA adapts no cross-attention."""
    assert read_header(write(lora({"mid_block.resnets.0.conv1": (8, 8)}), metadata)).family == family


@pytest.mark.parametrize(
    ("name", "entries", "title"),
    [
        ("noobaiXLNAIXL_vPred10Version.safetensors", {"ss_v_parameterization": "True"}, "SDXL (NoobAI, v-prediction)"),
        ("Illustrious-XL-v1.0.safetensors", {}, "SDXL (Illustrious)"),
        ("ponyDiffusionV6XL.safetensors", {"ss_v_parameterization": "False"}, "SDXL (Pony)"),
        ("animagine-xl-4.0.safetensors", {}, "SDXL (Animagine)"),
        ("sd_xl_base_1.0.safetensors", {}, "SDXL"),
    ],
)
def test_sdxls_children_are_named_where_the_header_tells(name, entries, title):
    assert base_title("sdxl", {"ss_sd_model_name": name} | entries) == title
    assert base_title("sd15", {"ss_sd_model_name": name}) == "SD1.5"


def test_family_titles():
    assert [family_title(f) for f in ("sd15", "sdxl", None)] == ["SD1.5", "SDXL", "an unknown family"]


def test_names_agree_with_diffusers_for_all_of_sd15(write):
    """The 278 modules that PCM adapts in a full-size SD1.5 UNet; the names come from PEFT, the file is a stand-in."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=TARGETS), unet)
    peft = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    theirs = {name for name in convert_state_dict_to_kohya(dict(peft)) if not name.endswith(".alpha")}

    header = read_header(write({name: torch.zeros(1, 1) for name in peft}))
    assert len(header.modules) == 278
    assert len(theirs) == 2 * 278
    assert set(header.kohya_names().values()) == theirs


def test_hashes_are_of_the_tensor_bytes(write):
    tensors = lora()
    plain, titled = write(tensors, name="a.safetensors"), write(tensors, {"title": "Told"}, name="b.safetensors")
    data = plain.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    assert tensor_hash(plain) == tensor_hash(titled) == hashlib.sha256(body).hexdigest()
    assert file_hash(plain) == hashlib.sha256(data).hexdigest() != file_hash(titled)


def test_metadata_is_read(write):
    header = read_header(write(lora(), {"title": "Näive style"}))
    assert header.metadata == {"title": "Näive style"}
    assert read_header(write(lora())).metadata == {}


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file at .*only .safetensors"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(
        FileNotFoundError, match="is a folder without adapter_model.safetensors .*, so it is no LoRA of theirs"
    ):
        read_header(tmp_path)


def test_pickles_are_refused_unopened(tmp_path):
    archive, bare = tmp_path / "style.ckpt", tmp_path / "style.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
    bare.write_bytes(pickle.dumps({"weight": list(range(100))}))
    for path in (archive, bare):
        with pytest.raises(
            ValueError, match=r"and no .safetensors file. Only .safetensors files are read .*convert it"
        ):
            read_header(path)


@pytest.mark.parametrize("length", [0x0280, 0x4B50])
def test_header_lengths_that_look_like_a_pickle_or_a_zip_are_read(write, length):
    """640 and 19280 are multiples of 8, as header lengths are; their low bytes begin a pickle and a zip file."""
    path = write(lora())
    data = path.read_bytes()
    old = struct.unpack("<Q", data[:8])[0]
    length += 0x10000 * (old // 0x10000 + 1)
    path.write_bytes(struct.pack("<Q", length) + data[8 : 8 + old].ljust(length) + data[8 + old :])
    assert read_header(path).modules.keys() == read_header(write(lora())).modules.keys()


def test_truncated_files_are_told_apart_from_whole_ones(write):
    path = write(lora())
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    for kept, complaint in (
        (len(data) - 1, f"cut short: {len(data) - 1} bytes of the {len(data)} that its header promises"),
        (8 + length, "that its header promises"),
        (8 + length // 2, f"less than its header of {length}"),
        (5, "is not a .safetensors file"),
        (0, "is empty"),
    ):
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=complaint):
            read_header(path)


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b"\xff\xfe{}",
    ],
)
def test_damaged_headers(tmp_path, text):
    path = tmp_path / "style.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="style.safetensors has a damaged safetensors header .* Get it again"):
        read_header(path)


@pytest.mark.parametrize("name", ["model.diffusion_model.out.2.weight", "emb_params"])
def test_a_file_without_lora(write, name):
    header = read_header(write({name: torch.zeros(2)}))
    assert header.unmatched == [name]
    with pytest.raises(ValueError, match=f"style.safetensors holds no LoRA: none of its 1 tensor names .*like {name}"):
        header.modules  # noqa: B018


def test_foreign_tensors_are_named(write):
    header = read_header(write(lora() | {"lora_unet_conv_in.vera_d": torch.zeros(2), "bundle_emb.x": torch.zeros(2)}))
    assert header.unmatched == ["bundle_emb.x", "lora_unet_conv_in.vera_d"]
