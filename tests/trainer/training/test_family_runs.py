"""Runs of PCM's relatives: resumed to the byte, started from a LoRA, taught by averages or by earlier students."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers import Recipe
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.generate import generate
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.lora.install import install_by_diffusers
from phased_consistency.trainer.lora.recipe import recipe_for
from phased_consistency.trainer.objectives import CTM, OBJECTIVES, tells_target_time
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training.checks import check_start
from phased_consistency.trainer.training.loop import Run, train
from phased_consistency.trainer.training.lora_init import start_from
from phased_consistency.trainer.training.setup import objective_of
from support.runs import TINY, metadata, sha256, small_config

UNGUIDED = {"objective__guidance": None}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    "objective",
    [
        {"objective__name": "lcm", "objective__target_ema": 0.9},
        {"objective__name": "progressive", "objective__halvings": 2},
        {"objective__name": "ct"} | UNGUIDED,
    ],
    ids=["averaged target", "earlier student", "curriculum"],
)
def test_a_run_goes_on_to_the_same_bytes(objective, cache, tmp_path):
    """Stopped after its fourth update of six, when the averages, stages and curricula have moved on."""
    settings = objective | {"data__cache": cache, "train__steps": 6, "train__save_every": 100}
    whole = train(small_config(tmp_path / "whole", **settings))
    stopped = Run(small_config(tmp_path / "stopped", **settings), Reporter())
    for _ in range(4):
        stopped.update()
    stopped._save(export_too=False)
    assert sha256(train(stopped.config)) == sha256(whole)


def test_the_target_is_made_with_the_averaged_weights(cache, tmp_path):
    run = Run(small_config(tmp_path, data__cache=cache, objective__name="lcm", objective__target_ema=0.99), Reporter())
    for _ in range(2):  # the average starts as the first update leaves the weights
        run.update()
    engine, batch = run.engine, run.batches.at(7)[1]
    moved = engine.step(batch).distance
    engine.average.weights = {n: torch.zeros_like(w) for n, w in run.adapter.named_parameters().items()}
    by_base = engine.step(batch).distance
    engine.average.weights = run.adapter.copy()
    by_itself = engine.step(batch).distance
    engine.average = None
    assert torch.equal(engine.step(batch).distance, by_itself)
    assert not torch.equal(by_base, by_itself) and not torch.equal(moved, by_itself)


def test_in_a_later_stage_the_teacher_is_the_student_that_was(cache, tmp_path):
    settings = {"objective__name": "progressive", "objective__halvings": 2, "train__steps": 4}
    run = Run(small_config(tmp_path, data__cache=cache, **settings), Reporter())
    run.update()
    assert not run.engine.earlier
    run.update()
    left = run.adapter.state()
    run.update()
    assert all(torch.equal(run.engine.earlier[n].cpu(), w) for n, w in left.items())
    assert any(not torch.equal(run.adapter.state()[n], w) for n, w in left.items())


def test_the_average_can_teach_the_next_stage(cache, tmp_path):
    """And its student begins as it: at the boundary teacher, student and average are one."""
    settings = {"objective__name": "progressive", "objective__halvings": 2, "train__steps": 4, "train__ema": 0.9}
    run = Run(small_config(tmp_path, data__cache=cache, objective__average_teaches="true", **settings), Reporter())
    run.update()
    before = run.adapter.state()
    run.update()
    average = run.trained.weights()
    assert all(torch.equal(run.engine.earlier[n].cpu(), w) for n, w in average.items())
    assert all(torch.equal(run.adapter.state()[n], w) for n, w in average.items())
    assert any(not torch.equal(before[n], w) for n, w in average.items())


# --- starting from a LoRA


def delta(base, adapter):
    base.network.set_adapters(adapter)
    layers = {n: m for n, m in base.network.named_modules() if adapter in getattr(m, "lora_A", ())}
    return {n: m.get_delta_weight(adapter) for n, m in layers.items()}


def starting(lora, **settings):
    """A run's configuration that starts from this LoRA, of four phases of 40 points."""
    given = {"objective__name": "lcf", "objective__points": 40, "objective__phases": 4} | UNGUIDED
    return small_config("nowhere", lora__init=lora, **(given | settings))


def test_a_run_starts_as_the_lora_it_is_given(lora):
    """Whatever its rank and alpha: here 4 and 2, in an adapter of 8 and 1."""
    base = load_base(TINY)
    adapter = Adapter(base.network, base.lora_targets, 8, 1.0, seed=3)
    told = start_from(starting(lora, lora__rank=8), base, adapter)
    assert told.endswith(f"at strength 1: {len(adapter.layers)} modules.")
    install_by_diffusers(lora, base, "file")
    meant, found = delta(base, "file"), delta(base, "default")
    assert meant.keys() == found.keys()
    for name, weight in meant.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-4)
    assert "start" not in base.network.peft_config


def rewritten(lora, path, **changes):
    """A copy of a LoRA with other fields in its recipe."""
    told = metadata(lora)
    told["pcm.recipe"] = replace(Recipe.from_header(told["pcm.recipe"]), **changes).to_header()
    save_file(load_file(lora), path, told)
    return path


def test_it_starts_at_the_strength_that_the_recipe_names(lora, tmp_path):
    base = load_base(TINY)
    weak = rewritten(lora, tmp_path / "weak.safetensors", strength=0.125)
    adapter = Adapter(base.network, base.lora_targets, 4, 2.0, seed=3)
    assert "at strength 0.125" in start_from(starting(weak), base, adapter)
    install_by_diffusers(lora, base, "file")
    meant, found = delta(base, "file"), delta(base, "default")
    for name, weight in meant.items():
        torch.testing.assert_close(found[name], 0.125 * weight, atol=1e-6, rtol=1e-4)


def test_prompts_are_dropped_only_for_a_lora_that_takes_cfg(lora, tmp_path):
    """A small-CFG LoRA is sampled without the empty prompt, and so is what comes of it."""
    base = load_base(TINY)
    wide = {"guidance_mode": "normalcfg", "guidance": 3.0, "guidance_max": 3.5, "negative_prompts": True}
    open_to_cfg = rewritten(lora, tmp_path / "open.safetensors", **wide)

    def dropped(config):
        return objective_of(config, base.facts).draw_dropped(10_000, torch.Generator().manual_seed(0)).sum().item()

    assert dropped(starting(lora)) == 0 and 800 < dropped(starting(open_to_cfg)) < 1200
    assert 4500 < dropped(starting(lora, objective__prompt_dropout=0.5)) < 5500, "as it is set"


def test_the_held_out_loss_of_a_stage_is_of_its_own_levels(cache, tmp_path):
    settings = {"objective__name": "progressive", "objective__halvings": 2, "train__steps": 4}
    run = Run(small_config(tmp_path, data__cache=cache, **settings), Reporter())
    jumps = {0: [], 2: [], 4: []}
    for step, widths in jumps.items():
        levels = run.batches.fixed(range(6), 0, step).levels
        edges = set(run.config.objective.edges(step // 2 if step < 4 else 1).tolist())
        assert {*levels.u.tolist(), *levels.s.tolist()} <= edges
        widths += (levels.u - levels.s).tolist()
    assert max(jumps[0]) < min(jumps[2]) and jumps[2] == jumps[4]


def test_its_recipe_keeps_the_guidance_of_what_it_started_from(lora, tmp_path):
    """Without a teacher the LoRA's own; without a LoRA that of the pictures; a teacher's run has its own."""
    base = load_base(TINY)
    wide = {"guidance_mode": "normalcfg", "guidance": 3.0, "guidance_max": 3.5, "negative_prompts": True}
    open_to_cfg = rewritten(lora, tmp_path / "open.safetensors", **wide)
    assert recipe_for(starting(lora), base.facts).guidance_mode == "smallcfg"
    assert recipe_for(starting(open_to_cfg), base.facts).guidance == 3
    distilled = recipe_for(starting(open_to_cfg, objective__name="pcm"), base.facts)
    assert (distilled.guidance_mode, distilled.guidance) == ("smallcfg", 1)
    plain = {"objective__name": "ct"} | UNGUIDED
    assert recipe_for(small_config("nowhere", **plain), base.facts).guidance_mode == "smallcfg", (
        "the teacher's, at CFG 3"
    )
    assert recipe_for(small_config("nowhere", **plain, data__images="mine"), base.facts).guidance_mode == "normalcfg"


def test_where_a_run_may_disappoint_is_said():
    plain = {"objective__name": "lcf"} | UNGUIDED
    without = small_config("nowhere", **plain).notes()
    assert [note.split(",")[0] for note in without] == [
        "lcf learns from pictures",
        "lcf is for few-step LoRAs: without lora.init it starts from the base",
    ]
    assert starting("a.safetensors", data__images="mine").notes() == []
    assert small_config("nowhere").notes() == []


def test_it_trains_on_from_there(lora, cache, tmp_path):
    settings = {"objective__name": "lcf", "objective__points": 40, "objective__phases": 4, "train__steps": 1} | UNGUIDED
    settings |= {"data__cache": cache, "train__lr": 1e-12, "lora__dtype": "fp32"}
    same = train(small_config(tmp_path / "run", base__path=TINY, lora__init=lora, **settings))
    given, made = load_file(lora), load_file(same)
    for name in (n for n in given if n.endswith("lora_up.weight")):
        torch.testing.assert_close(made[name], given[name].float(), atol=1e-5, rtol=0)


def test_a_lora_that_cannot_be_gone_on_from_is_refused(lora, tmp_path):
    base = load_base(TINY).facts
    refused = [
        (starting(lora, lora__rank=2), "has rank 4, more than lora.rank = 2. Set lora.rank=4"),
        (starting(lora, objective__phases=1), "jumps to the ticks 0, 250, 500, 750, 1000, and this run to 0, 1000"),
        (starting(lora, objective__points=50), "this run to 0, 240, 500, 740, 1000.* Set objective.phases=4 and obj"),
    ]
    for config, complaint in refused:
        with pytest.raises(ValueError, match=complaint):
            check_start(config, base)
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        check_start(starting(tmp_path / "absent.safetensors"), base)
    with pytest.raises(ValueError, match="is a LoRA for SD1.5, the base is SDXL"):
        check_start(starting(lora), load_base("tiny-sdxl").facts)
    as_v = rewritten(lora, tmp_path / "v.safetensors", prediction="v_prediction")
    with pytest.raises(ValueError, match="a base with v_prediction, and this one has epsilon"):
        check_start(starting(as_v), base)


def test_a_lora_to_start_from_is_looked_at_before_anything_is_cached(lora, tmp_path, fails):
    given = [f"lora.init={tmp_path / 'absent.safetensors'}", f"output={tmp_path / 'run'}", "base.dtype=fp32"]
    for more in ([], ["--dry-run"]):
        said = fails(2, "train", "--preset", "lcf-sd15", "base.path=tiny-sd15", "data.resolution=64", *given, *more)
        assert "absent.safetensors" in said
    assert not (tmp_path / "run" / "cache").exists()


# --- the target's time


def test_a_network_with_an_input_for_it_is_told_where_its_jump_ends(cache, tmp_path):
    """Student and target, not the teacher; the networks of the usual bases have no such input."""
    run = Run(small_config(tmp_path, data__cache=cache, objective__name="ctm"), Reporter())
    base, batch = run.base, run.batches.at(0)[1]
    assert base.target_time(batch.levels.s) == {}
    base.network.register_to_config(time_cond_proj_dim=16)
    base.network.time_embedding.cond_proj = torch.nn.Linear(16, base.network.time_embedding.linear_1.in_features, False)
    told, denoise = [], base.denoise

    def watching(x, tick, condition):
        told.append((run.adapter.is_off, "target_time" in condition))
        return denoise(x, tick, condition)

    base.denoise = watching
    distance = run.engine.step(batch).distance
    assert set(told) == {(True, False), (False, True)}
    base.target_time = lambda tick: {"target_time": torch.zeros(len(tick), 16)}
    assert not torch.equal(run.engine.step(batch).distance, distance)


def test_a_sampler_tells_it_too(cache, tmp_path):
    """Each step its end: the next level, or with gamma the level from which noise is added."""
    run = Run(small_config(tmp_path, data__cache=cache, objective__name="ctm"), Reporter())
    ends, base = [], run.base
    base.target_time = lambda tick: ends.append(tick.tolist()) or {}
    noise, how = torch.randn(2, 4, 4, 4), {"gamma": 0.3, "seed": 0}
    condition = {k: v.repeat(2, 1, 1) for k, v in run.cache.encoding([""]).items()}
    told = generate(base, condition, run.engine.null, noise, (1000, 500, 0), **how, target_time=True)
    assert ends == [[350, 350], [0, 0]]
    assert torch.equal(told, generate(base, condition, run.engine.null, noise, (1000, 500, 0), **how))
    assert [name for name in OBJECTIVES if tells_target_time(name)] == ["ctm"] == [CTM().name]
    assert not tells_target_time("hyper")
