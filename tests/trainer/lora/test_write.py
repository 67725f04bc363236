"""The LoRA file: what its header says, that its hashes are true, and that the self-test would notice a bad one."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import read_header, tensor_hash
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.lora.install import install, install_by_diffusers
from phased_consistency.trainer.lora.recipe import recipe_for
from phased_consistency.trainer.lora.selftest import self_test
from phased_consistency.trainer.lora.write import export, lora_tensors
from phased_consistency.trainer.training.loop import train
from support.runs import TINY, metadata, sha256, small_config
from support.sd3_base import make_pipeline, make_sd3_folder

# what kohya's scripts, A1111 and Civitai read
KOHYA_MINIMUM = {
    "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_output_name",
    "ss_sd_model_name", "ss_new_sd_model_hash", "ss_resolution", "ss_tag_frequency", "ss_steps", "ss_learning_rate",
    "ss_v2", "ss_seed", "sshs_model_hash",
}  # fmt: skip
MODELSPEC = {
    "sai_model_spec", "architecture", "implementation", "title", "description", "resolution", "prediction_type",
    "usage_hint", "tags", "hash_sha256",
}  # fmt: skip


@pytest.fixture(scope="module")
def strong():
    """A base with an adapter that matters: every weight random, alpha unlike rank."""
    base = load_base(TINY)
    adapter = Adapter(base.network, base.lora_targets, rank=4, alpha=2.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    adapter.load({n: 0.2 * torch.randn(w.shape, generator=generator) for n, w in adapter.state().items()})
    return base, adapter, base.encode_prompts([""])


@pytest.fixture
def saved(strong, tmp_path):
    """The adapter as a file, and the same tensors to change."""
    base, adapter, _ = strong
    path = tmp_path / "strong.safetensors"
    export(path, adapter.state(), small_config(tmp_path), base, step=7, samples=6)
    return path


def rewrite(path, change):
    """Give tensors other names, or leave out those that get none."""
    save_file({new: t for name, t in load_file(path).items() if (new := change(name))}, path)


def test_the_recipe_comes_back(trained):
    config, path = trained
    recipe = Recipe.from_header(metadata(path)[HEADER_KEY])
    assert (recipe.family, recipe.mode, recipe.points, recipe.phases, recipe.steps) == (
        "sd15",
        "deterministic",
        40,
        4,
        4,
    )
    assert (recipe.prediction, recipe.zero_terminal_snr, recipe.guidance, recipe.strength) == (
        "epsilon",
        False,
        1.0,
        1.0,
    )
    assert recipe.base_name == TINY and len(recipe.base_hash) == 64
    assert recipe.grid() == config.grid()


def test_a_stochastic_run_is_sampled_with_fresh_noise(tiny_base, tmp_path):
    recipe = recipe_for(small_config(tmp_path, objective__phases=1, objective__mode="stochastic"), tiny_base.facts)
    assert (recipe.mode, recipe.phases, recipe.gamma) == ("stochastic", 1, 1.0)


def test_the_header_says_what_loaders_and_people_ask(trained):
    config, path = trained
    told = metadata(path)
    assert told.keys() >= KOHYA_MINIMUM | {f"modelspec.{k}" for k in MODELSPEC}
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_steps"]) == ("4", "2.0", "4")
    assert told["ss_network_module"] == "networks.lora" and told["ss_sd_model_name"] == TINY
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert told["modelspec.title"] == config.name and "4 steps, CFG 1" in told["modelspec.usage_hint"]
    assert json.loads(told["pcm.config"]) == config.what_decides_the_weights()
    assert all(isinstance(value, str) for value in told.values())


def test_the_header_tells_no_time_and_no_place(trained):
    config, path = trained
    told = metadata(path)
    assert not {k for k in told if "date" in k or "time" in k or k.startswith("ss_training_")} - {"ss_training_comment"}
    assert str(config.run_folder) not in json.dumps(told) and str(Path.home()) not in json.dumps(told)


def test_the_header_is_small(trained):
    _, path = trained
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] < 2**20


def test_hashes_are_those_of_the_bytes(trained):
    _, path = trained
    data, told = path.read_bytes(), metadata(path)
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    assert told["sshs_model_hash"] == hashlib.sha256(body).hexdigest() == tensor_hash(path)
    assert told["modelspec.hash_sha256"] == "0x" + told["sshs_model_hash"]


def test_every_module_holds_its_alpha(trained):
    config, path = trained
    modules = read_header(path).modules
    assert len(modules) > 100
    assert all(m.keys.keys() == {"down", "up", "alpha"} and m.rank == config.lora.rank for m in modules.values())
    assert read_header(path).unmatched == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_have_kohyas_names_and_the_files_precision(dtype):
    weights = {"mid_block.proj_in.lora_A": torch.ones(2, 3), "mid_block.proj_in.lora_B": torch.ones(3, 2)}
    tensors = lora_tensors(weights, 2, 8.0, SD15, dtype)
    name = "lora_unet_mid_block_proj_in"
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        f"{name}.lora_down.weight": (2, 3), f"{name}.lora_up.weight": (3, 2), f"{name}.alpha": (),
    }  # fmt: skip
    assert {t.dtype for t in tensors.values()} == {dtype} and tensors[f"{name}.alpha"] == 8


def test_the_same_run_gives_the_same_bytes(tmp_path):
    seeds = {"once": 0, "again": 0, "other": 1}
    once, again, other = (sha256(train(small_config(tmp_path / n, train__seed=seed))) for n, seed in seeds.items())
    assert once == again != other


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_good_file_passes(strong, tmp_path, dtype):
    base, adapter, condition = strong
    path = tmp_path / "good.safetensors"
    export(path, adapter.state(), small_config(tmp_path, lora__dtype=dtype), base, 1, 1)
    result = self_test(path, base, adapter, condition)
    assert result.passed and result.unmatched == 0 and result.modules == len(adapter.layers)
    assert result.rms_effect > 0.1 * result.rms_output, "or the test would show nothing"
    assert result.weights_error < {"fp16": 1e-3, "bf16": 5e-3, "fp32": 1e-6}[dtype]
    assert result.sentence().startswith(f"0 keys unmatched of {len(adapter.layers)} modules, weights off by ")


def test_a_weak_file_without_alpha_fails_too(strong, tmp_path):
    """Its outputs differ by less than a base in bf16 rounds; its weights are twice too large."""
    base, adapter, condition = strong
    weak = {n: 1e-4 * w if n.endswith("lora_B") else w for n, w in adapter.state().items()}
    path = tmp_path / "weak.safetensors"
    export(path, weak, small_config(tmp_path, lora__dtype="fp32"), base, 1, 1)
    with adapter.using(weak):
        assert self_test(path, base, adapter, condition).passed
        rewrite(path, lambda name: None if name.endswith(".alpha") else name)
        result = self_test(path, base, adapter, condition)
    assert not result.passed and result.weights_error == pytest.approx(1, rel=1e-3)


def test_a_file_without_alpha_fails(strong, saved):
    rewrite(saved, lambda name: None if name.endswith(".alpha") else name)
    result = self_test(saved, *strong)
    assert not result.passed and result.unmatched == 0


def test_a_renamed_module_fails(strong, saved):
    rewrite(saved, lambda name: name.replace("mid_block_resnets_0_conv1", "mid_block_resnets_7_conv1"))
    result = self_test(saved, *strong)
    assert not result.passed and result.unmatched == 1


def test_the_self_test_leaves_the_adapter_as_it_was(strong, saved):
    base, adapter, condition = strong
    before = adapter.state()
    self_test(saved, base, adapter, condition)
    assert all(torch.equal(before[n], w) for n, w in adapter.state().items())
    assert list(base.network.peft_config) == ["default"] and base.network.active_adapters() == ["default"]
    assert all(p.requires_grad for p in adapter.parameters())


def test_a_file_of_wrong_shapes_is_refused_whole(strong, tmp_path):
    base, adapter, _ = strong
    path = tmp_path / "wide.safetensors"
    wide = {n: torch.cat([w, w]) if n.endswith("lora_B") else w for n, w in adapter.state().items()}
    export(path, wide, small_config(tmp_path), base, 1, 1)
    with pytest.raises(ValueError, match=f"diffusers cannot load wide.safetensors into {TINY}: .*size mismatch"):
        install_by_diffusers(path, base, "wide")
    with pytest.raises(ValueError, match=rf"129 of 129 modules do not fit {TINY}, such as lora_unet_down_blocks_0"):
        install(read_header(path), base, "wide")
    assert list(base.network.peft_config) == ["default"]


@pytest.fixture(scope="module", params=["sd3", "sd3.5"])
def strong_sd3(request, tiny_base, tmp_path_factory):
    """An SD3 with an adapter that matters on every kind of module, alpha unlike rank; its parts and its file."""
    folder, words = tmp_path_factory.mktemp(request.param), tiny_base.tokenizers[0]
    parts = make_sd3_folder(folder, words, dual=request.param == "sd3.5", t5=False)
    base = SD3.load(str(folder))
    adapter = Adapter(base.network, base.lora_targets, rank=4, alpha=1.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    adapter.load({n: 0.2 * torch.randn(w.shape, generator=generator) for n, w in adapter.state().items()})
    path = folder / "sd3.safetensors"
    config = small_config(folder, base__path=folder, lora__alpha=1, lora__dtype="fp32", objective__points=100)
    export(path, adapter.state(), config, base, step=7, samples=6)
    return base, adapter, path, make_pipeline(parts, words)


def test_an_sd3_file_passes_with_alpha_in_its_weights(strong_sd3):
    base, adapter, path, _ = strong_sd3
    result = self_test(path, base, adapter, base.encode_prompts([""]))
    assert result.passed and (result.unmatched, result.modules) == (0, len(adapter.layers))
    assert result.rms_effect > 0.1 * result.rms_output and result.rms_difference < 1e-4 * result.rms_effect


def test_diffusers_pipeline_adds_the_same_to_every_module(strong_sd3):
    """By `load_lora_weights`, which users call, and module by module: W + alpha / rank * B A."""
    base, adapter, path, pipeline = strong_sd3
    transformer = pipeline.transformer
    before = {name: layer.weight.clone() for name, layer in transformer.named_modules() if name in adapter.layers}
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora(components=["transformer"])
    state = adapter.state()
    for name, weight in before.items():
        added = transformer.get_submodule(name).weight - weight
        meant = (1.0 / 4) * state[f"{name}.lora_B"].flatten(1) @ state[f"{name}.lora_A"].flatten(1)
        torch.testing.assert_close(added, meant.view_as(weight), atol=1e-5, rtol=1e-4)
        assert added.abs().max() > 0.01, name
    assert len(before) == len(adapter.layers) == len(read_header(path).modules)


def test_an_sd3_file_is_named_as_diffusers_names_it_and_says_its_alpha(strong_sd3):
    base, adapter, path, _ = strong_sd3
    tensors, told = load_file(path), metadata(path)
    assert {k.removeprefix("transformer.").removesuffix(".weight") for k in tensors} == adapter.state().keys()
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "4.0")
    new = base.network.config.qk_norm is not None
    assert told["modelspec.architecture"] == f"stable-diffusion-v{'3.5-medium' if new else '3-medium'}/lora"
    assert told["ss_base_model_version"] == ("sd3.5_medium" if new else "sd3_medium")
    assert "modelspec.prediction_type" not in told and read_header(path).family == "sd3"
    recipe = Recipe.from_header(told[HEADER_KEY])
    assert (recipe.prediction, recipe.shift, recipe.points) == ("flow", 3.0, 100)


def test_an_sd3_file_with_alpha_tensors_is_read_here_and_refused_by_diffusers(strong_sd3, tmp_path):
    base, _, path, pipeline = strong_sd3
    module = "transformer.transformer_blocks.0.attn.to_q"
    save_file(load_file(path) | {f"{module}.alpha": torch.tensor(1.0)}, tmp_path / "alpha.safetensors")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(str(tmp_path), weight_name="alpha.safetensors")
    with pytest.raises(ValueError, match=rf"diffusers refuses SD3 LoRAs with tensors such as {module}.alpha"):
        install_by_diffusers(tmp_path / "alpha.safetensors", base, "other")
    install(read_header(tmp_path / "alpha.safetensors"), base, "other")
    layer, halved = base.network.get_submodule(module.partition(".")[2]), load_file(path)
    want = halved[f"{module}.lora_B.weight"] @ halved[f"{module}.lora_A.weight"] / 4
    torch.testing.assert_close(layer.get_delta_weight("other"), want)
    base.network.delete_adapters("other")
    base.network.set_adapters("default")


def test_a_recipe_for_every_kind_of_run(tiny_base, tmp_path):
    normal = recipe_for(
        small_config(tmp_path, objective__guidance_mode="normalcfg", objective__phases=8), tiny_base.facts
    )
    assert (normal.guidance, normal.guidance_min, normal.guidance_max) == (4.5, 3.0, 6.0)
    assert normal.negative_prompts and normal.guidance_mode == "normalcfg"
    one = recipe_for(small_config(tmp_path, objective__phases=1, objective__min_alpha=0.5), tiny_base.facts)
    assert (one.mode, one.steps, one.min_alpha, one.negative_prompts) == ("deterministic", 1, 0.5, False)
