"""`lora.ranks`: modules with ranks of their own, all of one strength, and what a file holds of them."""

from __future__ import annotations

import re

import pytest
import torch

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.adapter import CRITIC, Adapter
from phased_consistency.trainer.training.checkpoint import agreed_changes
from phased_consistency.trainer.training.loop import train
from phased_consistency.trainer.training.plan import plan
from support.runs import TINY, settings, small_config

RANKS = {r"attn2\.to_[kv]": 6, "attn": 2, "conv": 0}


def toml(ranks):
    return "{" + ", ".join(f"'{pattern}' = {rank}" for pattern, rank in ranks.items()) + "}"


def expected(path, rank=4):
    return next((r for pattern, r in RANKS.items() if re.search(pattern, path)), rank)


def test_every_module_has_the_rank_of_the_first_pattern_that_finds_it(tmp_path):
    """In the file too, where all have one alpha, with as many parameters as the dry run says. The run's self-test has
    compared what diffusers makes of it, which loses alphas that differ."""
    config = small_config(tmp_path, base__path=TINY, lora__rank=4, lora__alpha=2.0, lora__ranks=toml(RANKS))
    said = plan(config)
    header = read_header(train(config))
    assert len(header.network) == said["lora_modules"]
    alphas, sizes = header.alphas(), 0
    for name, module in header.network.items():
        path = name.removeprefix("lora_unet_").replace("attn2_to", "attn2.to")
        assert "conv" not in path and module.rank == expected(path)
        assert alphas[name] == 2
        sizes += sum(torch.Size(module.shapes[half]).numel() for half in ("down", "up"))
    assert {module.rank for module in header.network.values()} == {2, 4, 6}
    assert sizes == said["trained_parameters"]


def test_a_critic_has_them_in_its_own_proportion():
    base = load_base(str(TINY))
    student = Adapter(base.network, base.lora_targets, 4, 2.0, seed=0, ranks=RANKS)
    critic = Adapter(base.network, base.lora_targets, 8, 4.0, seed=0, name=CRITIC, ranks={"attn2": 12, "conv": 0})
    assert critic.layers.keys() == student.layers.keys()
    layer = next(layer for path, layer in critic.layers.items() if path.endswith("attn2.to_k"))
    assert (layer.r, layer.scaling) == ({"default": 6, CRITIC: 12}, {"default": 0.5, CRITIC: 0.5})


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"attn3": 4}, r"lora.ranks: 'attn3' finds none of the 129 modules .*such as down_blocks.*Take a part of such"),
        ({"attn": 2, r"attn2\.to_k": 6}, r"all \d+ modules that 'attn2.+' finds are found by a pattern before it, and"),
        ({"attn": "true"}, "lora.ranks.attn = True: input should be a valid integer"),
        ({".": 0}, "lora.ranks leaves no module to be trained"),
        ({"attn[": 4}, r"'attn\[' is no regular expression"),
        ({"attn": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(tmp_path, ranks, message):
    overrides = settings(tmp_path / "run", base__path=TINY, lora__ranks=toml(ranks))
    with pytest.raises(ValueError, match=message):
        train(load_config(overrides=overrides))
    with pytest.raises(ValueError, match=message):
        plan(load_config(overrides=overrides))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_lora_of_more_than_some_module_s_rank_is_no_start(tmp_path, trained):
    start = {"lora__init": trained[1], "lora__rank": 4, "lora__ranks": "{attn2 = 1}"}
    with pytest.raises(ValueError, match="has rank 4, and lora.ranks gives attn2 less"):
        plan(small_config(tmp_path, base__path=TINY, **start))


def test_a_run_from_before_there_were_ranks_goes_on(tmp_path):
    """It has none in its checkpoints, and no change of settings is seen."""
    settings_now = small_config(tmp_path).what_decides_the_weights()
    then = settings_now | {"lora": {key: value for key, value in settings_now["lora"].items() if key != "ranks"}}
    assert agreed_changes(tmp_path, (2, {"settings": then, "changes": []}), settings_now) == []
