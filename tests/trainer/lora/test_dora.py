"""`lora.dora`: rows at lengths of their own, gone with the adapter, and files that every program reads alike."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.recipe import HEADER_KEY
from phased_consistency.trainer.efficiency.blocks import Offload, recompute
from phased_consistency.trainer.efficiency.folding import fold_where_cheaper
from phased_consistency.trainer.efficiency.half import run_in_half
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.generate import probe
from phased_consistency.trainer.lora.adapter import CRITIC, Adapter
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.dora import lengths
from phased_consistency.trainer.lora.install import ADAPTER, install, install_for_sample, load_for_check
from phased_consistency.trainer.training.checkpoint import agreed_changes
from phased_consistency.trainer.training.failure import RunStopped
from phased_consistency.trainer.training.loop import Run, train
from phased_consistency.trainer.training.plan import plan
from support.runs import Notes, other_precision, sha256, small_config, speck

FAMILIES = {"sd15": {}, "sd3": {"objective__points": 100}}


def make(dtype=torch.float32, family="sd15", strong=True, **settings):
    """A base, its DoRA with random weights if `strong`, and a function that draws its output."""
    base = load_base(speck(family).name, dtype=dtype)
    adapter = Adapter(base.network, base.lora_targets, 4, 2.0, seed=0, dora=True, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapter.named_parameters().items() if strong else ():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = weight * (1 + 0.1 * noise) if name.endswith("vector") else weight + 0.1 * noise
    (x, tick), condition = probe(base), base.encode_prompts([""])
    return base, adapter, lambda: base.denoise(x, tick, condition)


def by_definition(base, adapter):
    """W + s B A, each row at its magnitude, in the weights themselves and in float64 on the way."""
    state = adapter.state()
    adapter.network.disable_adapters()
    for path, layer in adapter.layers.items():
        frozen = layer.get_base_layer().weight
        a, b, m = (state[f"{path}.{part}"].double() for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
        weight = frozen.double() + 0.5 * (b.flatten(1) @ a.flatten(1)).view(frozen.shape)
        rows = weight.flatten(1)
        frozen.data = (m.flatten()[:, None] * rows / rows.norm(dim=1, keepdim=True)).view(frozen.shape).to(frozen)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["by PEFT", "folded", "computed again", "offloaded", "in half"])
@torch.no_grad()
def test_it_is_its_definition_whichever_way_it_is_computed(family, way):
    base, adapter, draw = make(torch.bfloat16 if way == "in half" else torch.float32, family)
    if way == "in half":
        run_in_half(adapter)
    elif way == "folded":
        fold_where_cheaper(adapter)
    elif way == "computed again":
        recompute(adapter)
    elif way == "offloaded":
        Offload(base.network, base.device)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "in half"):
        student = draw()
    with adapter.off():
        bare = draw()
    plain, again, expected = make(family=family)
    by_definition(plain, again)
    effect = (expected() - bare).abs().max()
    assert (student - expected()).abs().max() < (0.05 if way == "in half" else 1e-4) * effect


@pytest.mark.parametrize("way", ["by PEFT", "folded", "in half"])
def test_a_new_one_changes_nothing_and_the_teacher_has_no_magnitudes(way):
    base, adapter, draw = make(torch.bfloat16 if way == "in half" else torch.float32, strong=False)
    if way != "by PEFT":
        (run_in_half if way == "in half" else fold_where_cheaper)(adapter)
    first = adapter.copy()
    with torch.no_grad(), adapter.off():
        bare = draw()
    torch.testing.assert_close(draw(), bare, atol=1e-5, rtol=1e-5)

    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    draw().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    optimizer.step()
    assert (draw() - bare).abs().max() > 1e-3
    with torch.no_grad(), adapter.off():
        assert torch.equal(draw(), bare)
    with adapter.using(first):
        torch.testing.assert_close(draw(), bare, atol=1e-5, rtol=1e-5)


def gradients(way):
    base, adapter, draw = make()
    if way == "folded":
        fold_where_cheaper(adapter)
    draw().square().sum().backward()
    return {name: p.grad for name, p in adapter.named_parameters().items()}


def test_folded_it_learns_the_same():
    for (name, meant), grad in zip(gradients("by PEFT").items(), gradients("folded").values(), strict=True):
        torch.testing.assert_close(grad, meant, atol=1e-4 * meant.abs().max().item(), rtol=1e-3, msg=name)


@torch.no_grad()
def test_a_critic_has_magnitudes_of_its_own():
    base, student, draw = make()
    critic = Adapter(base.network, base.lora_targets, 4, 2.0, seed=0, name=CRITIC, dora=True)
    before = draw()
    with student.off():
        bare = draw()
    with critic.in_place(student):
        torch.testing.assert_close(draw(), bare, atol=1e-5, rtol=1e-5)
    assert torch.equal(draw(), before) and not torch.equal(before, bare)


@pytest.fixture(scope="module")
def doras(tmp_path_factory):
    """Family -> the run's configuration and its DoRA, after a few updates."""
    made = {}
    for family, settings in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family) / "run"
        config = small_config(folder, base__path=speck(family).name, lora__dora="true", **settings)
        made[family] = config, train(config)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_one_file_says_the_same_to_peft_and_to_comfyui(doras, family):
    """PEFT: m (W + B A) / |W + B A|, which the run's self-test has compared; ComfyUI: dora_scale (W + B A) / |W|."""
    config, path = doras[family]
    tensors, base = load_file(path), load_base(config.base.path)
    modules = read_header(path).modules
    moved = []
    for name, module in modules.items():
        assert module.title == "DoRA" and module.keys.keys() == {"down", "up", "dora_scale", "magnitude"}
        a, b, scale, m = (tensors[module.keys[part]] for part in ("down", "up", "dora_scale", "magnitude"))
        inside = name.split("_", 2)[2]
        (place,) = (place for place, _ in base.network.named_modules() if place.replace(".", "_") == inside)
        layer = base.network.get_submodule(place)
        weight = layer.weight + (b.float().flatten(1) @ a.float().flatten(1)).view(layer.weight.shape)
        assert scale.dtype == m.dtype == torch.float32 and scale.shape == (len(b), *[1] * (weight.ndim - 1))
        as_peft = base.host_rows(place, m.flatten() / lengths(weight) * lengths(layer.weight))
        torch.testing.assert_close(scale.flatten(), as_peft)
        moved.append((m.flatten() / lengths(layer.weight) - 1).abs().max())
    assert min(moved) > 0 and max(moved) > 0.01
    assert json.loads(read_header(path).metadata["pcm.config"])["lora"]["dora"] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_checked_and_sampled(doras, family):
    config, path = doras[family]
    result = check_parity(path, load_for_check(config.base.path))
    assert result["passed"] and result["text"].startswith("OK: 0 keys unmatched"), result["text"]
    base = load_base(config.base.path)
    with pytest.raises(
        ValueError, match=r"is a DoRA, and strength 0.5 of it is not 0.5 times its effect: .*strength 1"
    ):
        install_for_sample(path, base, 0.5)
    assert install_for_sample(path, base, None).notes == ()
    base.network.delete_adapters(ADAPTER)


def test_a_run_goes_on_exactly_with_its_average_and_from_before_there_were_any(tmp_path, monkeypatch):
    whole, halves = (small_config(tmp_path / n, lora__dora="true", train__ema=0.5) for n in ("whole", "halves"))
    once = train(whole)
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        update = Run.update
        patch.setattr(Run, "update", lambda run: (update(run), setattr(run.stopper, "stop_requested", run.step == 2)))
        train(halves)
    assert sha256(train(halves)) == sha256(once)

    now = small_config(tmp_path).what_decides_the_weights()
    then = now | {"lora": {key: value for key, value in now["lora"].items() if key != "dora"}}
    assert agreed_changes(tmp_path, (2, {"settings": then, "changes": []}), now) == []
    assert small_config(tmp_path, lora__dora="false").what_decides_the_weights() == now


def started(config):
    """What a run that has not made an update yet draws, and what it says of its start."""
    notes = Notes()
    run = Run(config, notes)
    (x, tick), condition = probe(run.base), run.cache.encoding([""])
    with torch.no_grad():
        return run.base.denoise(x, tick, condition), next(line for line in notes.said if "It starts as" in line)


def sampled(config, path):
    base = load_base(config.base.path)
    install(read_header(path), base, ADAPTER)
    (x, tick), condition = probe(base), base.encode_prompts([""])
    with torch.no_grad():
        return base.denoise(x, tick, condition)


def test_a_dora_goes_on_from_a_dora_or_from_a_lora(doras, tmp_path, pcm):
    config, path = doras["sd15"]
    plain = train(small_config(tmp_path / "plain", train__steps=2))
    for start in (path, plain):
        settings = {"lora__init": start, "lora__dora": "true", "lora__rank": 6}
        output, said = started(small_config(tmp_path / f"from-{start.stem}-{start.parent.name}", **settings))
        torch.testing.assert_close(output, sampled(config, start), atol=1e-4, rtol=1e-4)
        assert "29 modules" in said
    with pytest.raises(ValueError, match=r"is a DoRA, and this run trains a LoRA without magnitudes. Set lora.dora="):
        plan(small_config(tmp_path / "no", lora__init=path))


def test_a_dora_of_another_strength_is_no_start(doras, tmp_path):
    header = read_header(path := doras["sd15"][1])
    recipe = replace(Recipe.from_header(header.metadata[HEADER_KEY]), strength=0.5)
    metadata = header.metadata | {HEADER_KEY: recipe.to_header()}
    save_file(load_file(path), weak := tmp_path / "weak.safetensors", metadata)
    with pytest.raises(ValueError, match=r"is a DoRA that is sampled at strength 0\.5, and magnitudes have no"):
        plan(small_config(tmp_path / "run", lora__init=weak, lora__dora="true"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base__quantize": "int8"}, "lora.dora does not go with base.quantize: leave one of them out"),
        ({"train__compile": "true"}, "lora.dora does not go with train.compile"),
        ({"train__shard": "true"}, "lora.dora does not go with train.shard"),
        ({"lora__dora": "often"}, "lora.dora"),
    ],
)
def test_what_it_does_not_go_with_is_said_before_anything_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(small_config(tmp_path, **{"lora__dora": "true"} | settings))


def test_the_dry_run_counts_the_magnitudes(tmp_path):
    without, with_them = (plan(small_config(tmp_path, lora__dora=dora)) for dora in ("false", "true"))
    _, adapter, _ = make()
    rows = sum(p.numel() for name, p in adapter.named_parameters().items() if name.endswith("vector"))
    assert with_them["trained_parameters"] - without["trained_parameters"] == rows
    assert "a DoRA of rank 4" in with_them["text"] and "a LoRA of rank 4" in without["text"]


def test_what_would_save_memory_is_nothing_that_it_does_not_go_with(tmp_path):
    settings = {"base__path": "tiny-emoji", "data__resolution": 128, "objective__points": 100}
    plans = (plan(small_config(tmp_path, **settings, lora__dora=dora)) for dora in ("false", "true"))
    without, with_them = (set(facts["would_save_gib"]) for facts in plans)
    assert without - with_them == {"base.quantize=int8"}, (without, with_them)


def test_a_row_of_zeros_has_no_length_to_be_trained():
    base = load_base(speck().name)
    base.network.mid_block.attentions[0].proj_in.weight.data[3] = 0
    with pytest.raises(
        ValueError,
        match=r"lora.dora: mid_block.attentions.0.proj_in has no lengths to be trained, 1 of its \d+ rows are 0",
    ):
        Adapter(base.network, base.lora_targets, 4, 2.0, seed=0, dora=True)


def test_other_verbs_refuse_it_by_name(doras, fails, tmp_path):
    path, out = doras["sd15"][1], tmp_path / "out.safetensors"
    for run in (
        ("convert", path, out, "--to", "kohya"),
        ("resize", path, "--out", out, "--rank", 2),
        ("merge", path, path, "--out", out),
        ("train", "--preset", "demo-sd15", f"base.loras={path}", f"output={tmp_path / 'run'}", "--dry-run"),
    ):
        assert "is no plain LoRA: of its 29 modules 29 DoRA, such as" in fails(2, *run)


def test_magnitudes_of_another_number_are_refused(doras, tmp_path):
    config, path = doras["sd15"]
    tensors, header = load_file(path), read_header(path)
    key = next(iter(header.network.values())).keys["magnitude"]
    save_file(tensors | {key: torch.ones(3)}, other := tmp_path / "other.safetensors", header.metadata)
    with pytest.raises(ValueError, match=r"the magnitudes of lora_unet_\w+ are of shape \(3,\); expected \d+ numbers"):
        install(read_header(other), load_base(config.base.path), ADAPTER)


def test_a_run_in_16_bits_passes_its_self_test(tmp_path):
    notes = Notes()
    with other_precision():
        train(small_config(tmp_path, base__dtype="bf16", lora__dora="true", train__steps=2), notes)
    assert any(line.endswith(").") and "0 keys unmatched of 29 modules" in line for line in notes.said)


@pytest.mark.parametrize(
    "settings",
    [
        {"adversarial__weight": 0.1, "adversarial__width": 8},
        {"train__offload": "true"},
        {"objective__name": "tdm", "objective__phases": 2, "objective__critic_warmup": 1, "objective__scale": 2},
        {"objective__target_ema": 0.5},
        {"train__optimizer": "adafactor"},
    ],
)
def test_it_is_trained_with_what_else_there_is(tmp_path, settings):
    assert read_header(train(small_config(tmp_path, lora__dora="true", **settings))).network
