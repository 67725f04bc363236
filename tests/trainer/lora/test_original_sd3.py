"""SD3 LoRAs in Stability's layout, q, k and v in one, as sd-scripts and others write them: with each, the base predicts
what its single file predicts when the same products are added to the weights in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from host.conftest import NO_HOST
from host.server import hosts
from host.tiny_sd3 import make_transformer
from phased_consistency.samplers.lora_alphas import PEFT_KEY
from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_info import facts
from phased_consistency.trainer.families.generate import probe
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.install import ADAPTER, install, installed
from phased_consistency.trainer.lora.merged import merge_into
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.sharing.merge import merge
from phased_consistency.trainer.sharing.read import read_lora
from phased_consistency.trainer.sharing.resize import resize
from phased_consistency.trainer.tiny.single_file import sd3_transformer
from phased_consistency.trainer.training.checks import check_loaded
from phased_consistency.trainer.training.lora_init import start_from
from support.runs import small_config
from support.sd3_base import make_sd3_folder, save_sd3_single_file
from support.sharing_files import pair_of
from support.sharing_table import by_host

NETWORK = "model.diffusion_model."
RANK, ALPHA = 4, 2.0
ENDS = ("context_embedder", "x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1")
ENDS += ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2")
QKV = "joint_blocks.1.x_block.attn.qkv"
LAST = "joint_blocks.3.context_block.adaLN_modulation.1"


class Single(NamedTuple):
    """A small base as one checkpoint, the folder of its configs, and its network's weights by Stability's names."""

    file: Path
    configs: Path
    weights: dict[str, Tensor]

    def load(self, file: Path | None = None) -> SD3:
        return SD3.load(str(file or self.file), config=str(self.configs))

    def with_added(self, deltas: Mapping[str, Tensor], out: Path) -> SD3:
        """The base whose checkpoint has these products added to its weights."""
        tensors = load_file(self.file)
        for name, delta in deltas.items():
            weight = tensors[f"{NETWORK}{name}.weight"]
            weight += delta.view_as(weight)
        save_file(tensors, out)
        return self.load(out)


@pytest.fixture(scope="module", params=["sd3", "sd3.5"])
def single(request, tiny_base, tmp_path_factory) -> Single:
    folder = tmp_path_factory.mktemp(request.param)
    dual = request.param == "sd3.5"
    parts = make_sd3_folder(folder / "configs", tiny_base.tokenizers[0], dual=dual, t5=False)
    file = save_sd3_single_file(folder / "small.safetensors", parts)
    weights = {k.removeprefix(NETWORK): v for k, v in load_file(file).items() if k.startswith(NETWORK)}
    return Single(file, folder / "configs", weights)


def kohya(module: str) -> tuple[str, str, str]:
    name = f"lora_unet_{module.replace('.', '_')}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def onetrainer(module: str) -> tuple[str, str, str]:
    return tuple(key.replace("lora_unet_", "lora_transformer_") for key in kohya(module))


def host(module: str) -> tuple[str, str, str]:
    """As ComfyUI saves them."""
    return tuple(f"diffusion_model.{module}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))


def peft(module: str) -> tuple[str, str, str]:
    return tuple(f"{module}.{part}" for part in ("lora_A.default.weight", "lora_B.default.weight", "alpha"))


def adapted(weights: Mapping[str, Tensor]) -> list[str]:
    """What sd-scripts trains: every linear layer of the blocks, and with `emb_dims` those at the network's ends."""
    linear = re.compile(r"(joint_blocks\.\d+\..*(qkv|proj|fc\d|Modulation\.1|modulation\.1))\.weight")
    blocks = [m[1] for name in weights if (m := linear.fullmatch(name))]
    return [*blocks, *ENDS]


def factors(weight: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """Random factors; split: three LoRAs for q, k and v laid into one, as sd-scripts' split_qkv saves them."""
    if not split:
        return pair_of(weight, RANK, 0.3)
    pairs = [pair_of(rows, RANK, 0.3) for rows in weight.chunk(3)]
    return torch.cat([down for down, _ in pairs]), torch.block_diag(*(up for _, up in pairs))


def write(
    path: Path, weights: Mapping[str, Tensor], names=kohya, modules=None, split=False, alpha=ALPHA, **metadata
) -> dict[str, Tensor]:
    """Write a random LoRA on these modules (default: all); returns what it adds to each weight."""
    tensors, deltas = {}, {}
    for module in modules or adapted(weights):
        down, up = factors(weights[f"{module}.weight"], split and module.endswith("qkv"))
        keys = names(module)
        tensors |= {keys[0]: down, keys[1]: up} | ({} if alpha is None else {keys[2]: torch.tensor(alpha)})
        scale = 1.0 if alpha is None else alpha / len(down)
        deltas[module] = scale * up.flatten(1) @ down.flatten(1)
    save_file(tensors, path, metadata)
    return deltas


def predicted(base: SD3) -> Tensor:
    x, tick = probe(base)
    with torch.no_grad():
        return base.denoise(x, tick, base.encode_prompts(["a red star"]))


def with_lora(path: Path, base: SD3) -> Tensor:
    with installed(path, base):
        return predicted(base)


@pytest.mark.parametrize("split", [False, True], ids=["one", "split_qkv"])
@pytest.mark.parametrize("names", [kohya, onetrainer, host, peft])
def test_it_predicts_what_the_single_file_with_the_products_added_predicts(names, split, single, tmp_path):
    deltas = write(lora := tmp_path / "lora.safetensors", single.weights, names, split=split)
    wanted = predicted(single.with_added(deltas, tmp_path / "added.safetensors"))
    base = single.load()
    assert (wanted - predicted(base)).abs().max() > 0.1
    torch.testing.assert_close(with_lora(lora, base), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [QKV, LAST, *ENDS, "joint_blocks.0.context_block.attn.qkv"])
def test_each_kind_of_module_is_for_its_own_layers(module, single, tmp_path):
    deltas = write(lora := tmp_path / "lora.safetensors", single.weights, modules=[module])
    base = single.load()
    bare, got = predicted(base), with_lora(lora, base)
    assert not torch.equal(bare, got)
    torch.testing.assert_close(got, predicted(single.with_added(deltas, tmp_path / "a.safetensors")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", [False, True], ids=["one", "split_qkv"])
def test_the_verbs_write_the_same(split, single, tmp_path):
    write(lora := tmp_path / "lora.safetensors", single.weights, split=split)
    base = single.load()
    wanted = with_lora(lora, base)
    for style in ("kohya", "diffusers"):
        convert(lora, there := tmp_path / f"{style}.safetensors", style, family="sd3")
        convert(there, back := tmp_path / f"{style}2.safetensors", "kohya", family="sd3")
        for path in (there, back):
            torch.testing.assert_close(with_lora(path, base), wanted, rtol=0, atol=1e-5)
    assert {pair.rank for pair in read_lora(lora, "sd3").pairs.values()} == {RANK}

    merge([(lora, 0.5), (lora, 0.5)], twice := tmp_path / "merged.safetensors", family="sd3")
    torch.testing.assert_close(with_lora(twice, base), wanted, rtol=0, atol=1e-5)
    resize(twice, small := tmp_path / "resized.safetensors", rank=RANK, family="sd3")
    torch.testing.assert_close(with_lora(small, base), wanted, rtol=0, atol=1e-4)


def test_one_in_8_bits_is_written_in_16(single, tmp_path):
    """Where alpha is worked in: before it is rounded again."""
    write(lora := tmp_path / "lora.safetensors", single.weights)
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in load_file(lora).items()}, lora)
    assert convert(lora, out := tmp_path / "out.safetensors", "diffusers", family="sd3")["error"] < 1e-3
    base = single.load()
    torch.testing.assert_close(with_lora(out, base), with_lora(lora, base), rtol=0, atol=3e-3)


def test_it_is_checked_merged_into_a_base_and_begun_from(single, tmp_path):
    modules = [name for name in adapted(single.weights) if name != "final_layer.adaLN_modulation.1"]
    write(lora := tmp_path / "lora.safetensors", single.weights, modules=modules)
    base, wanted = single.load(), with_lora(lora, single.load())
    adapter = Adapter(base.network, base.lora_targets, RANK, 1.0, seed=3)
    line = start_from(small_config("nowhere", lora__init=lora, lora__rank=RANK), base, adapter)
    torch.testing.assert_close(predicted(base), wanted, rtol=0, atol=1e-5)
    assert line == f"It starts as {lora} at strength 1: {len(adapter.layers)} modules."

    base = single.load()
    (line,) = merge_into(base, [f"{lora}"])
    torch.testing.assert_close(predicted(base), wanted, rtol=0, atol=1e-5)
    assert line == f"Merged into the base: lora.safetensors at strength 1, {len(adapter.layers)} modules."

    result = check_parity(lora, single.load())
    assert result["passed"] and result["compared_as_sampled"] and result["modules"] == len(modules), result["text"]
    assert facts(read_header(lora))["kinds"] == {"LoRA": len(modules)}, "as they are in the file"


def test_a_layer_that_is_not_trained_is_no_start(single, tmp_path):
    write(lora := tmp_path / "lora.safetensors", single.weights, modules=[QKV, "final_layer.adaLN_modulation.1"])
    config = small_config("nowhere", lora__init=lora, lora__rank=RANK, data__resolution=64)
    said = "lora.safetensors: 1 of its 4 layers are not trained here, such as norm_out.linear. Start from a LoRA"
    with pytest.raises(ValueError, match=said):
        check_loaded(config, single.load())


def test_alphas_in_the_header_are_read(single, tmp_path):
    """Of PEFT, by patterns of the file's own names."""
    config = f'{{"transformer.lora_alpha": 2, "transformer.alpha_pattern": {{"{QKV}": 8}}, "transformer.r": {RANK}}}'
    deltas = write(
        lora := tmp_path / "lora.safetensors", single.weights, peft, [QKV, LAST], alpha=None, **{PEFT_KEY: config}
    )
    wanted = single.with_added({QKV: 2 * deltas[QKV], LAST: 0.5 * deltas[LAST]}, tmp_path / "added.safetensors")
    torch.testing.assert_close(with_lora(lora, single.load()), predicted(wanted), rtol=0, atol=1e-5)


def test_what_fits_no_layer_is_refused_by_name(single, tmp_path):
    write(lora := tmp_path / "lora.safetensors", single.weights, modules=[QKV, LAST])
    tensors, (_, up, _) = load_file(lora), kohya(QKV)

    save_file(tensors | {up: torch.ones(97, RANK)}, lora)
    name = f"lora.safetensors: lora_unet_{QKV.replace('.', '_')} has 97 rows, which are no 3 equal parts. Get it again"
    with pytest.raises(ValueError, match=name):
        install(read_header(lora), single.load(), ADAPTER)
    with pytest.raises(ValueError, match=name):
        convert(lora, tmp_path / "out.safetensors", "kohya", family="sd3")

    save_file(tensors | {up: torch.ones(48, RANK)}, lora)
    with pytest.raises(
        ValueError, match="1 of 2 modules do not fit .*, such as lora_unet_joint_blocks_1_x_block_attn_"
    ):
        install(read_header(lora), single.load(), ADAPTER)

    other = {key.replace("blocks_1", "blocks_9"): tensors[key].clone() for key in kohya(QKV)}
    save_file(tensors | other, lora)
    with pytest.raises(
        ValueError, match="1 of 3 modules do not fit .*, such as lora_unet_joint_blocks_9_x_block_attn_"
    ):
        install(read_header(lora), single.load(), ADAPTER)

    query = "transformer.transformer_blocks.1.attn.to_q"
    more = {f"{query}.lora_A.weight": torch.ones(RANK, 32), f"{query}.lora_B.weight": torch.ones(32, RANK)}
    save_file(tensors | more, lora)
    with pytest.raises(
        ValueError, match="has transformer_blocks.1.attn.to_q under two names, lora_.*qkv.* Get it again"
    ):
        install(read_header(lora), single.load(), ADAPTER)


@pytest.mark.host
@pytest.mark.skipif(not hosts(), reason=NO_HOST)
def test_comfyui_adds_the_same_and_so_it_does_of_what_is_made_of_it(tmp_path):
    weights = {name: weight.contiguous() for name, weight in sd3_transformer(make_transformer().state_dict()).items()}
    save_file(weights, file := tmp_path / "weights.safetensors")
    loras = []
    for split in (False, True):
        deltas = write(lora := tmp_path / f"{split}.safetensors", weights, split=split)
        shaped = {f"{name}.weight": delta.view_as(weights[f"{name}.weight"]) for name, delta in deltas.items()}
        save_file(shaped, meant := tmp_path / f"{split}_meant.safetensors")
        convert(lora, kohyas := tmp_path / f"{split}_kohya.safetensors", "kohya", family="sd3")
        convert(lora, diffusers := tmp_path / f"{split}_diffusers.safetensors", "diffusers", family="sd3")
        loras += [(str(path), str(meant)) for path in (lora, kohyas, diffusers)]
    answers = by_host(hosts()[-1], [{"weights": str(file), "loras": loras}])
    for (lora, _), answer in zip(loras, answers, strict=True):
        assert not answer["unmatched"] and answer["error"] < 1e-6, (lora, answer)
