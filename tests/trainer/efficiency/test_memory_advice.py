"""The memory that a run takes, and what would lower it: numbers checked by hand, and promises that are kept."""

import json
import weakref

import pytest
import torch
from torch import nn

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.efficiency import memory
from phased_consistency.trainer.efficiency.activations import kept_activations, most_bytes
from phased_consistency.trainer.efficiency.blocks import Offload, blocks_of
from phased_consistency.trainer.efficiency.footprint import footprint
from phased_consistency.trainer.efficiency.half import run_in_half
from phased_consistency.trainer.efficiency.memory import (
    BEFORE,
    PREVIEWS,
    TRAINING,
    estimate_memory,
    explain_out_of_memory,
    recomputed,
    switches,
)
from phased_consistency.trainer.efficiency.quantize import quantize, stored_bytes
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.base import DTYPES
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.system.machine import GIB, out_of_memory
from support.runs import TINY, small_config


def full_size(*overrides):
    return load_config(overrides=["train.gradient_checkpointing=false", *overrides], preset="sd15-4step")


def total(config):
    return estimate_memory(config, SD15)["gib"][TRAINING]


class Steps(nn.Module):
    """Two squares of a linear layer, of which autograd keeps the layers' inputs and the squares'."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).square()
        return x


def test_what_autograd_keeps_of_a_known_network():
    with torch.device("meta"):
        network, x = Steps(), torch.empty(16, 8)
    activations = kept_activations(network, lambda: network(x))
    # x, its product, the square, its product: each 16 x 8 numbers of 4 bytes; the last square is only an output
    assert activations.bytes(()) == 4 * 16 * 8 * 4
    assert most_bytes(lambda: network(x)) == 3 * 16 * 8 * 4, "a layer's input, its output, the square"


def test_estimated_activations_are_those_that_autograd_keeps(tmp_path):
    """In fp32, but for attention, of which a GPU's kernels keep less."""
    config = small_config(tmp_path, base__path=TINY)
    base = load_base(TINY)
    Adapter(base.network, base.lora_targets, config.lora.rank, config.lora.alpha, seed=0)
    estimated = footprint(config, SD15).activations.bytes(())
    assert bytes_kept(base) == pytest.approx(estimated, rel=0.05)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_of_a_quantised_base_autograd_keeps_no_more(tmp_path, format):
    """No weight as its product took it, which the estimate does not count."""
    pytest.importorskip("torchao")
    config = small_config(tmp_path, base__path=TINY)
    base = load_base(TINY)
    Adapter(base.network, base.lora_targets, config.lora.rank, config.lora.alpha, seed=0)
    quantize(base.network, format)
    estimated = footprint(config, SD15).activations.bytes(())
    assert bytes_kept(base) == pytest.approx(estimated, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_of_a_dora_autograd_keeps_no_more_than_is_estimated(tmp_path, dtype):
    """What it makes of weights, for their rows' lengths, is gone with its layer."""
    config = small_config(tmp_path, base__path=TINY, lora__dora="true", base__dtype=dtype)
    base = load_base(TINY, dtype=DTYPES[dtype])
    adapter = Adapter(base.network, base.lora_targets, config.lora.rank, config.lora.alpha, seed=0, dora=True)
    if dtype == "bf16":
        run_in_half(adapter)
    estimated = footprint(config, SD15).activations.bytes(())
    assert bytes_kept(base) == pytest.approx(estimated, rel=0.05)


class Kept:
    """A tensor in autograd's graph."""

    def __init__(self, tensor):
        self.tensor = tensor


def bytes_kept(base):
    """Bytes of what autograd keeps for a pass, but for the network's own weights."""
    parameters, seen = {p.untyped_storage().data_ptr() for p in base.network.parameters() if plain(p)}, []

    def pack(tensor):
        seen.append(weakref.ref(kept := Kept(tensor)))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        point = torch.randn(1, *base.latent_shape(32)), torch.tensor([500]), base.encode_prompts(["a red star"])
        result = base.denoise(*point)
    tensors = [kept.tensor for reference in seen if (kept := reference())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if plain(t)}
    del result
    return sum(size for place, size in storages.items() if place not in parameters)


def plain(tensor):
    """Whether a tensor has numbers of its own: a quantised weight's parts have them."""
    return not hasattr(tensor, "__tensor_flatten__")


@pytest.mark.parametrize("format", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_estimated_weights_are_the_bytes_that_are_there(tmp_path, format, dtype):
    config = small_config(tmp_path, base__path=TINY, base__dtype=dtype, base__quantize=format)
    base = load_base(TINY, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    if format:
        pytest.importorskip("torchao")
        quantize(base.network, format)
    there = sum(map(stored_bytes, base.network.parameters()))
    assert memory._frozen_bytes(config, footprint(config, SD15)) == there


def test_offloaded_weights_leave_all_but_the_largest_blocks(tmp_path):
    """Three of them: one at work, one on its way, one whose memory is not free yet."""
    config = small_config(tmp_path, base__path=TINY, train__offload="true")
    network = load_base(TINY).network
    blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(network).values()]
    everything = sum(p.nbytes for p in network.parameters())
    assert memory._frozen_bytes(config, footprint(config, SD15)) == everything - sum(blocks) + sum(sorted(blocks)[-3:])
    assert Offload(network, torch.device("cpu")).bytes == sum(blocks)


def test_pictures_that_are_encoded_count_before_training(tmp_path):
    """By the batch in which they are, in fp32: twice as many hold twice as much."""
    few, many = (full_size(f"data.images={tmp_path}", f"data.batch_size={n}") for n in (8, 16))
    before = {
        n: estimate_memory(c, SD15)["gib"][f"{BEFORE}the larger of UNet and encoders"]
        for n, c in ((8, few), (16, many))
    }
    sizes = footprint(few, SD15)
    assert sizes.encoding > 512 * 512 * 128 * 4 * 2, "at least the first convolution's output and what it is made of"
    assert before[16] - before[8] == pytest.approx(8 * sizes.encoding / GIB, abs=2e-3)
    assert estimate_memory(full_size(), SD15)["gib"][f"{BEFORE}the larger of UNet and encoders"] < before[8]


def test_previews_are_drawn_with_a_copy_of_the_weights():
    small, large = (full_size(f"lora.rank={rank}") for rank in (64, 128))
    gib = [estimate_memory(config, SD15)["gib"][PREVIEWS] for config in (small, large)]
    assert gib[1] - gib[0] == pytest.approx(67_252_224 * (16 + 4) / GIB, abs=2e-3), "trained, and drawn with"


def test_several_processes_send_their_gradients_in_one_piece(monkeypatch):
    alone = total(full_size())
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = full_size()
    assert total(config) - alone == pytest.approx(67_252_224 * 4 / GIB, abs=2e-3)
    gib = estimate_memory(config, SD15)["gib"]
    assert gib["gradients in one piece, 2 processes"] == pytest.approx(67_252_224 * 4 / GIB, abs=2e-3)


def test_the_optimizers_saving_is_six_bytes_a_parameter():
    config = full_size()
    saving = dict(switches(config, SD15))["train.optimizer=adamw8bit"]
    assert saving == pytest.approx(67_252_224 * 6 / GIB, abs=2e-3)


def test_each_switch_lowers_the_estimate_by_what_was_promised():
    config = full_size()
    savings = switches(config, SD15)
    assert [gib for _, gib in savings] == sorted((gib for _, gib in savings), reverse=True)
    names = {setting.partition("=")[0] for setting, _ in savings}
    every = {"train.gradient_checkpointing", "train.offload", "base.quantize", "train.optimizer", "train.batch_size"}
    assert names == every
    for setting, gib in savings:
        after = full_size(*setting.split())
        assert total(config) - total(after) == pytest.approx(gib, abs=2e-3), setting
        assert setting not in dict(switches(after, SD15)), "what is on is not advised"


def test_out_of_memory_names_the_three_best():
    config = full_size()
    text = explain_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"), config, SD15)
    best = switches(config, SD15)
    assert text.startswith("CUDA out of memory. Tried 2 GiB.\nBy estimate: ") and "more" not in text
    places = [text.index(f"{setting} saves about {gib:.2g} GiB") for setting, gib in best[:3]]
    assert places == sorted(places) and best[3][0] not in text


def test_what_is_out_of_memory():
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError("out of memory"))


def auto(limit, *more):
    return load_config(
        overrides=["train.gradient_checkpointing=auto", f"train.memory_limit_gib={limit}", "train.batch_size=4", *more],
        preset="sd15-4step",
    )


def again(config):
    """The blocks of SD1.5 that are computed again."""
    return recomputed(config, SD15, footprint(config, SD15).blocks)


def test_auto_takes_as_few_blocks_as_the_limit_asks_for():
    """More for less memory, each time those that save most for what they cost, and the estimate fits."""
    before = None
    for limit in (100, 8, 6):
        config = auto(limit)
        chosen = again(config)
        assert total(config) * memory.MARGIN <= limit
        if chosen:
            fewer = memory._bytes(config, SD15, footprint(config, SD15), chosen[:-1])
            assert sum(fewer.values()) * memory.MARGIN > limit * GIB, "one block fewer would not fit"
        assert before is None and not chosen or chosen[: len(before or [])] == (before or [])
        before = chosen
    assert 0 < len(before) < 38


def test_auto_takes_every_block_where_nothing_would_fit():
    assert len(again(auto(1))) == 38


def test_auto_without_a_gpu_asks_for_the_limit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(overrides=["train.gradient_checkpointing=auto"], preset="sd15-4step")
    with pytest.raises(ValueError, match="there is no CUDA device. Set train.memory_limit_gib, or"):
        again(config)


def test_auto_on_a_gpu_asks_how_much_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * GIB)
    config = load_config(overrides=["train.gradient_checkpointing=auto"], preset="sd15-4step")
    assert memory.limit_bytes(config) == 7.5 * GIB, "free, this process's own, and its context"


def test_the_dry_run_shows_what_would_save(pcm, tmp_path):
    result = pcm("train", "--preset", "sd15-4step", "train.offload=true", "--dry-run", "--json")
    plan = json.loads(result.out)
    assert plan["blocks_computed_again"] == 38 and plan["would_save_gib"]["train.optimizer=adamw8bit"] > 0
    text = pcm("train", "--preset", "sd15-4step", "--dry-run").out
    assert "Would save, each alone (GiB)" in text and "base.quantize=int8" in text


def test_a_verdict_names_the_switches():
    from phased_consistency.trainer.cli.doctor import _verdict

    run = {"memory_gib": {TRAINING: 20.0}, "would_save_gib": {"train.offload=true": 4.6, "base.quantize=int8": 2.03}}
    details = {"run": run, "device": {"kind": "cuda", "memory_gib": 12.0}}
    wanted = "so it will not fit: train.offload=true saves about 4.6 GiB; base.quantize=int8 saves about 2 GiB."
    assert _verdict(details).endswith(wanted)
    details["device"]["memory_gib"] = 24.0
    assert _verdict(details).endswith("so it fits.")
