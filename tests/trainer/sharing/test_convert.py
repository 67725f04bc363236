"""Converting LoRAs: names by every network, weights and alphas as they were, and diffusers and PEFT as the judges."""

import json
from random import Random

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from phased_consistency.samplers.lora_file import header_text, read_header, split_key, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.cli.share import VERBS
from phased_consistency.trainer.families import FAMILIES
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.install import ADAPTER, installed, load_for_check
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.sharing.names import dotted_name, kohya_name
from phased_consistency.trainer.sharing.read import read_lora
from support.bases import make_sdxl_folder
from support.runs import TINY
from support.sd3_base import make_sd3_folder
from support.sharing_files import MODULES, RECIPE, SD3_MODULES, deltas, kohya_file, pair_of


@pytest.fixture
def kohya(tiny_base, tmp_path):
    return kohya_file(tmp_path / "kohya.safetensors", tiny_base, dtype=torch.float16)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_every_module_of_the_real_networks_has_its_name_back(family):
    kind, count = FAMILIES[family], 0
    for folder in sorted(kind.configs.parent.glob(f"{family}*/{kind.component}")):
        with torch.device("meta"):
            network = kind.network_class.from_config(kind.network_class.load_config(folder))
        for path in (n for n, m in network.named_modules() if getattr(m, "weight", None) is not None):
            dotted = f"{kind.component}.{path}"
            assert dotted_name(split_key(f"{dotted}.alpha")[0], kind) == dotted
            assert dotted_name(kohya_name(dotted, kind), kind) == dotted
            count += 1
    assert count > 300


def test_text_encoders_have_names_too():
    path = "text_model.encoder.layers.11.self_attn.out_proj"
    for family, prefix in (("sd15", "lora_te_"), ("sdxl", "lora_te1_")):
        name = prefix + path.replace(".", "_")
        assert kohya_name(f"text_encoder.{path}", FAMILIES[family]) == name
        assert dotted_name(name, FAMILIES[family]) == f"text_encoder.{path}"
    assert dotted_name("lora_unet_mid_block_adapter_0", FAMILIES["sd15"]) is None


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_either_style_loads_at_its_own_strength(kohya, tmp_path, style):
    """`pcm check`, by diffusers' loader and by hand: alpha comes from PEFT's metadata, or from tensors."""
    out = tmp_path / "converted.safetensors"
    convert(kohya, out, style)
    result = check_parity(out, load_for_check(TINY))
    assert result["passed"] and result["unmatched"] == 0, result["text"]


def test_there_and_back_is_the_same_file_but_for_its_header(kohya, tmp_path):
    there, back = tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors"
    result = convert(kohya, there, "diffusers")
    assert (result["modules"], result["alpha"], result["alpha_worked_in"]) == (len(MODULES), "as in the file", 0)
    assert not any(name.endswith("alpha") for name in load_file(there))
    convert(there, back, "kohya")
    first, last = load_file(kohya), load_file(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[k], last[k]) and first[k].dtype == last[k].dtype for k in first)
    assert tensor_hash(back) == tensor_hash(kohya) != tensor_hash(there)


def test_metadata_stays_and_hashes_are_true(kohya, tmp_path):
    for style in ("kohya", "diffusers"):
        convert(kohya, out := tmp_path / f"{style}2.safetensors", style)
        metadata = read_header(out).metadata
        assert metadata[HEADER_KEY] == RECIPE.to_header() and metadata["ss_steps"] == "7"
        assert (
            metadata["sshs_model_hash"] == tensor_hash(out)
            and metadata["modelspec.hash_sha256"] == f"0x{tensor_hash(out)}"
        )
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")


@torch.no_grad()
def test_diffusers_takes_the_converted_file_as_the_original(kohya, tmp_path):
    """Its own loader, which reads alpha from the header."""
    convert(kohya, out := tmp_path / "diffusers.safetensors", "diffusers")
    base = load_for_check(TINY)
    x, tick, condition = torch.randn(1, 4, 16, 16), torch.tensor([500]), base.encode_prompts(["a red star"])
    bare = base.denoise(x, tick, condition)
    with installed(kohya, base):
        meant = base.denoise(x, tick, condition)
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(
        str(out.parent), weight_name=out.name, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, None, base.network, adapter_name=ADAPTER, metadata=metadata)
    actual = base.denoise(x, tick, condition)
    assert (meant - bare).abs().max() > 1e-2
    torch.testing.assert_close(actual, meant, rtol=0, atol=1e-5)


def test_ranks_and_alphas_that_differ_reach_diffusers(tiny_base, tmp_path):
    first = kohya_file(tmp_path / "a.safetensors", tiny_base, MODULES[:3], rank=2, alpha=1.0)
    second = kohya_file(tmp_path / "b.safetensors", tiny_base, MODULES[3:], rank=4, alpha=3.0)
    save_file(load_file(first) | load_file(second), tmp_path / "both.safetensors", read_header(first).metadata)
    convert(tmp_path / "both.safetensors", out := tmp_path / "out.safetensors", "diffusers")
    base = load_for_check(TINY)
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(
        str(out.parent), weight_name=out.name, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, None, base.network, adapter_name=ADAPTER, metadata=metadata)
    for name, delta in deltas(read_lora(tmp_path / "both.safetensors")).items():
        layer = base.network.get_submodule(name.removeprefix("unet."))
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER).flatten(1).double(), delta, rtol=1e-5, atol=1e-7)


def raw_file(path, base, rank=4, modules=MODULES, prefix="unet.base_model.model."):
    """As PCM's scripts write: PEFT's names, no alpha, no metadata."""
    tensors = {}
    for module in modules:
        down, up = pair_of(base.network.get_submodule(module).weight, rank)
        tensors |= {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
    save_file(tensors, path)
    return path


def test_raw_files_of_pcms_scripts_get_their_alpha(tiny_base, tmp_path):
    out = tmp_path / "out.safetensors"
    raw = raw_file(tmp_path / "raw.safetensors", tiny_base)
    with pytest.raises(ValueError, match=r"PEFT's raw names .* no alpha.* Give --alpha \(8 for PCM's"):
        convert(raw, out, "kohya", family="sd15")
    assert convert(raw, out, "kohya", family="sd15", alpha=8.0)["alpha"] == "as --alpha says"
    assert {p.alpha for p in read_lora(out, "sd15").pairs.values()} == {8.0}
    assert check_parity(out, load_for_check(TINY))["passed"]
    named = raw.rename(tmp_path / "pcm_sd15_smallcfg_4step.safetensors")
    result = convert(named, out, "kohya", family="sd15", overwrite=True)
    assert (result["alpha"], result["recipe_from"]) == ("that of PCM's scripts", "known file")
    recipe = read_lora(out).recipe
    assert (recipe.objective, recipe.phases, recipe.source) == ("pcm", 4, "header")


def test_a_peft_folder_brings_its_alpha(tiny_base, tmp_path):
    raw = raw_file(tmp_path / "adapter_model.safetensors", tiny_base, prefix="base_model.model.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "alpha_pattern": {}}))
    result = convert(raw, tmp_path / "out.safetensors", "kohya", family="sd15")
    assert result["alpha"] == "as in adapter_config.json"
    assert {p.alpha for p in read_lora(tmp_path / "out.safetensors").pairs.values()} == {6.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    convert(raw, tmp_path / "rs.safetensors", "kohya", family="sd15")
    assert {p.scale for p in read_lora(tmp_path / "rs.safetensors").pairs.values()} == {6 / 4**0.5}
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        convert(raw, tmp_path / "other.safetensors", "kohya", family="sd15")


@pytest.fixture(scope="module")
def sd3(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    make_sd3_folder(folder, tiny_base.tokenizers[0], t5=False)
    return load_for_check(str(folder))


def test_sd3s_raw_files_become_what_pcms_converter_makes(sd3, tmp_path):
    """It halves every tensor, which is right for rank 32 and alpha 8 alone; sqrt(alpha / rank) is right for all."""
    raw = raw_file(tmp_path / "raw.safetensors", sd3, rank=32, modules=SD3_MODULES, prefix="transformer.")
    halved = {name: (tensor / 2).half() for name, tensor in load_file(raw).items()}
    save_file(halved, tmp_path / "half_raw.safetensors")
    result = convert(raw, out := tmp_path / "out.safetensors", "diffusers", family="sd3", alpha=8.0)
    assert result["alpha_worked_in"] == len(SD3_MODULES)
    ours = load_file(out)
    assert all(torch.equal(ours[name].half(), halved[name]) for name in halved)
    assert StableDiffusion3Pipeline.lora_state_dict(str(out.parent), weight_name=out.name).keys() == halved.keys()
    parity = check_parity(out, sd3)
    assert parity["passed"], parity["text"]


def test_sd3s_halved_files_are_right_as_they_are(sd3, tmp_path):
    halved = raw_file(tmp_path / "half.safetensors", sd3, rank=32, modules=SD3_MODULES, prefix="transformer.")
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    assert convert(halved, kohya, "kohya", family="sd3")["alpha"] == "none in the file, which stands for the rank"
    assert {p.alpha for p in read_lora(kohya, "sd3").pairs.values()} == {32.0}
    assert "lora_transformer_pos_embed_proj.lora_down.weight" in load_file(kohya)
    assert convert(kohya, back, "diffusers", family="sd3")["alpha_worked_in"] == 0
    assert tensor_hash(back) == tensor_hash(halved)


def test_names_of_the_original_layout_are_turned_by_diffusers(tiny_base, tmp_path):
    """As kohya trains SDXL: middle_block.1 is mid_block.attentions.0."""
    make_sdxl_folder(tmp_path / "base", tiny_base.tokenizers[0])
    base, inside = load_for_check(str(tmp_path / "base")), "transformer_blocks.0.attn1.to_out.0"
    down, up = pair_of(base.network.get_submodule(f"mid_block.attentions.0.{inside}").weight, 2)
    name = f"lora_unet_middle_block_1_{inside.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "sgm.safetensors")
    convert(tmp_path / "sgm.safetensors", out := tmp_path / "out.safetensors", "kohya", family="sdxl")
    (item,) = read_lora(out, "sdxl").pairs.items()
    assert item[0] == f"unet.mid_block.attentions.0.{inside}" and item[1].alpha == 3
    assert torch.equal(item[1].down, down) and torch.equal(item[1].up, up)
    assert check_parity(out, base)["passed"]
    with pytest.raises(ValueError, match=f"has unet.mid_block.attentions.0.{inside} under two names"):
        save_file(tensors | load_file(out), tmp_path / "mixed.safetensors")
        convert(tmp_path / "mixed.safetensors", tmp_path / "x.safetensors", "kohya", family="sdxl")


def change(path, **changes):
    """The file with tensors renamed or left out (None); "*" stands for every tensor's name."""
    tensors = load_file(path)
    for old, new in changes.items():
        for name in [n for n in tensors if old in n]:
            tensor = tensors.pop(name)
            if new is not None:
                tensors[name.replace(old, new)] = tensor
    save_file(tensors, path, read_header(path).metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mid_block_attentions_0_proj_in": "mid_block_adapter_0"}, "lora_unet_mid_block_adapter_0 is no module of SD"),
        ({"proj_in.lora_down.weight": "proj_in.hada_w1_a"}, "is no plain LoRA: of its 6 modules 1 LoRA with biases"),
        ({"proj_in.lora_up.weight": None}, "has lora_unet_mid_block_attentions_0_proj_in.* and no up half of it"),
        ({"proj_in.alpha": None}, "1 of 6 modules have lost their alpha, such as lora_unet_mid_block"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(kohya, tmp_path, changes, message):
    change(kohya, **changes)
    with pytest.raises(ValueError, match=message):
        convert(kohya, tmp_path / "out.safetensors", "diffusers")
    assert not (tmp_path / "out.safetensors").exists()


def test_damaged_and_mixed_files_are_refused(kohya, tmp_path, tiny_base):
    out, whole = tmp_path / "out.safetensors", kohya.read_bytes()
    kohya.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="kohya.safetensors is cut short"):
        convert(kohya, out, "diffusers")
    kohya.write_bytes(whole)
    tensors, name = load_file(kohya), "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_k"
    for block, width in ((1, 768), (2, 2048)):
        tensors[f"{name.format(block)}.lora_down.weight"] = torch.zeros(4, width)
        tensors[f"{name.format(block)}.lora_up.weight"] = torch.zeros(8, 4)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match="mixed.safetensors mixes modules of SD1.5 and SDXL"):
        convert(tmp_path / "mixed.safetensors", out, "diffusers")
    tensors.pop(f"{name.format(1)}.lora_down.weight")
    save_file(tensors, tmp_path / "liar.safetensors", read_header(kohya).metadata)
    with pytest.raises(ValueError, match="LoRA for SDXL by its tensors, and for SD1.5 by its header"):
        convert(tmp_path / "liar.safetensors", out, "diffusers")
    bad = load_file(kohya)
    next(iter(bad.values())).fill_(float("nan"))
    save_file(bad, tmp_path / "nan.safetensors", read_header(kohya).metadata)
    with pytest.raises(ValueError, match="numbers that are not finite"):
        convert(tmp_path / "nan.safetensors", out, "diffusers")
    (tensors := load_file(kohya))["lora_unet_mid_block_attentions_0_proj_in.alpha"].fill_(0)
    save_file(tensors, tmp_path / "zero.safetensors", read_header(kohya).metadata)
    with pytest.raises(ValueError, match="alpha of lora_unet_mid_block_attentions_0_proj_in is 0; expected a number"):
        convert(tmp_path / "zero.safetensors", out, "diffusers")
    with pytest.raises(ValueError, match="kohya.safetensors has its own alpha. Leave --alpha out"):
        convert(kohya, out, "diffusers", alpha=8.0)
    with pytest.raises(ValueError, match="kohya.safetensors is a LoRA for SD1.5, not SDXL"):
        convert(kohya, out, "diffusers", family="sdxl")


def test_a_damaged_byte_is_a_sentence_or_does_no_harm(kohya, tmp_path):
    """300 files with a few bytes of the header, or of the first tensors, changed."""
    data, random, refusals = kohya.read_bytes(), Random(0), 0
    words = len(header_text(kohya)) + 8
    for trial in range(300):
        changed = bytearray(data)
        for _ in range(random.randint(1, 3)):
            changed[random.randrange(8 if trial % 10 else 0, words + 40)] = random.choice(b'0129"[],:{}.Fx')
        (bad := tmp_path / "bad.safetensors").write_bytes(changed)
        try:
            convert(bad, tmp_path / "out.safetensors", "diffusers", family="sd15", overwrite=True)
        except ValueError as error:
            assert len(str(error)) > 20
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (("lora_down.weight", torch.zeros(())), r"the halves of .*_proj_in are of shapes \(\)"),
        (("lora_down.weight", torch.zeros(3, 112)), r"are of shapes \(3, 112\) and \(112, 4, 1, 1\); expected"),
        (("lora_up.weight", torch.zeros(112, 4, dtype=torch.int8)), r"1 of its 6 modules as integers.*\(F16, I8\)"),
        (("alpha", torch.zeros(2)), r"proj_in.alpha is F32 of shape \[2\], not one number"),
    ],
)  # fmt: skip
def test_tensors_of_no_pair_are_named(kohya, tmp_path, tensor, message):
    name = f"lora_unet_mid_block_attentions_0_proj_in.{tensor[0]}"
    save_file(load_file(kohya) | {name: tensor[1]}, kohya, read_header(kohya).metadata)
    with pytest.raises(ValueError, match=message):
        convert(kohya, tmp_path / "out.safetensors", "diffusers")


def test_the_verb(pcm, fails, kohya, tmp_path):
    out = tmp_path / "out.safetensors"
    report = json.loads(pcm("convert", kohya, out, "--to", "diffusers", "--json").out)
    assert report["modules"] == len(MODULES) and report["family"] == "sd15"
    assert "exists already: choose another name, or add --overwrite" in fails(2, "convert", kohya, out, "--to", "kohya")
    assert "never written over" in fails(2, "convert", kohya, kohya, "--to", "kohya", "--overwrite")
    assert "--to is 'peft'; available: kohya, diffusers" in fails(2, "convert", kohya, out, "--to", "peft")
    assert "must end in .safetensors" in fails(2, "convert", kohya, tmp_path / "out.ckpt", "--to", "kohya")
    assert "No file at" in fails(
        2, "convert", tmp_path / "none.safetensors", tmp_path / "o.safetensors", "--to", "kohya"
    )
    blocked = fails(1, "convert", kohya, kohya / "sub" / "o.safetensors", "--to", "kohya")
    assert "Cannot write" in blocked and "nothing that was there is lost" in blocked


def test_every_sharing_verb_has_help(pcm):
    for verb in VERBS:
        result = pcm(verb.__name__, "--help")
        assert result.code == 0 and f"pcm {verb.__name__}" in result.out and "Example: pcm" in result.out
        assert "--json" in result.out and result.err == ""
