"""Runs that match distributions: two adapters on one base, resumed to the byte, seen as they are sampled."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from phased_consistency.trainer.efficiency.blocks import recompute
from phased_consistency.trainer.efficiency.memory import explain_out_of_memory
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.generate import draw
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.lora.recipe import recipe_for
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training.critic import Critic
from phased_consistency.trainer.training.loop import Run, train
from phased_consistency.trainer.training.plan import plan
from support.runs import TINY, Notes, metadata, sha256, small_config

TDM = {
    "objective__name": "tdm",
    "objective__phases": 2,
    "objective__critic_warmup": 1,
    "objective__scale": 2,
    "train__lr": 1e-3,
}
DMD = {
    "objective__name": "dmd",
    "objective__steps": 2,
    "objective__critic_warmup": 1,
    "objective__critic_rank": 2,
    "objective__guidance_levels": "above",
    "train__lr": 1e-3,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def started(folder, **changes):
    return Run(small_config(folder, **TDM | changes), Reporter())


def disturb(adapter, seed):
    """Weights that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "settings",
    [
        TDM | {"objective__critic_ema": 0.5, "train__ema": 0.9, "train__accumulation": 2, "train__batch_size": 2},
        DMD,
        TDM | {"objective__anchor": 0.5, "objective__anchor_steps": 2, "objective__landing": "anywhere"},
    ],
    ids=["tdm", "dmd", "anchor"],
)
def test_a_run_goes_on_to_the_same_bytes(settings, cache, tmp_path):
    settings = settings | {"data__cache": cache, "train__steps": 3, "train__save_every": 100}
    whole = train(small_config(tmp_path / "whole", **settings))
    stopped = Run(small_config(tmp_path / "stopped", **settings), Reporter())
    for _ in range(2):
        stopped.update()
    stopped._save(export_too=False)
    assert sha256(train(stopped.config)) == sha256(whole)
    ends = [next((tmp_path / run / "checkpoints").glob("*-0000003*")) for run in ("whole", "stopped")]
    first, second = map(load_file, ends)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    groups = {key.partition("/")[0] for key in first}
    assert groups >= {"adapter", "critic", "optimizer"}
    assert ("critic average" in groups) == ("objective__critic_ema" in settings)


def test_the_file_is_a_plain_lora_without_the_critic(cache, tmp_path):
    config = small_config(tmp_path / "run", **TDM, data__cache=cache, train__steps=2)
    path, notes = train(config, Notes()), Notes()
    train(config, notes)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    assert keys and not any("critic" in key for key in keys)
    plain = load_file(train(small_config(tmp_path / "pcm", train__steps=1)))
    assert plain.keys() == set(keys)
    assert metadata(path)["ss_training_comment"] == "tdm, 2 phases, phased-consistency"
    assert [line.name for line in cache.rglob("latents-*")], "the samples are there"
    for file in cache.rglob("latents-*"):
        assert set(load_file(file)) == {"sizes", "shape"}, "and no latent"


def test_the_critic_alone_learns_first(cache, tmp_path):
    run = started(tmp_path, data__cache=cache)
    student, critic = run.adapter.state(), run.engine.critic.adapter.state()
    assert all(torch.equal(student[name], critic[name]) for name in student), "it begins as the student does"
    run.update()
    assert all(torch.equal(run.adapter.state()[name], weight) for name, weight in student.items())
    assert any(not torch.equal(run.engine.critic.adapter.state()[n], w) for n, w in critic.items())
    run.update()
    assert any(not torch.equal(run.adapter.state()[name], weight) for name, weight in student.items())


@pytest.mark.parametrize("settings", [TDM, DMD], ids=["tdm", "dmd"])
def test_the_trajectory_is_what_the_lora_draws(settings, cache, tmp_path):
    """Its last x0 is the picture that a sampler makes of the same noise by the recipe, with the same fresh noise."""
    run = Run(small_config(tmp_path, data__cache=cache, **settings), Reporter())
    disturb(run.adapter, 1)
    batch = run.batches.at(0)[1]
    recipe, fresh = recipe_for(run.config, run.base.facts), batch.draws.fresh
    made = iter([] if fresh is None else fresh.unbind(1))
    ticks = recipe.grid().plan(recipe.steps).ticks
    assert ticks[:-1] == run.config.objective.starts()
    with torch.no_grad():
        picture = draw(
            run.base, recipe, batch.condition, run.engine.null, batch.noise, ticks,
            noise_sampler=lambda *_: next(made),
        )  # fmt: skip
    torch.testing.assert_close(run.engine.unrolled(batch).landings[-1], picture, atol=2e-4, rtol=1e-3)


def test_the_dry_run_counts_the_passes_that_are_made(cache, tmp_path):
    for settings in (TDM, DMD, TDM | {"objective__anchor": 1.0, "objective__guidance_mode": "normalcfg"}):
        settings = settings | ({"objective__scale": None} if "objective__anchor" in settings else {})
        config = small_config(tmp_path / settings["objective__name"], **settings, data__cache=cache)
        run = Run(config, Reporter())
        run.update()
        assert plan(config)["forward_passes_per_sample"] == run.engine.evaluations / config.train.batch_size


# --- two adapters on one base


@pytest.fixture
def pair():
    """A base with a student and a critic, neither the identity."""
    config = small_config("nowhere", **TDM, objective__critic_rank=8, base__path=TINY)
    base = load_base(TINY)
    student = Adapter(base.network, base.lora_targets, rank=4, alpha=2.0, seed=0)
    critic = Critic(config, base, student)
    disturb(student, 1)
    disturb(critic.adapter, 2)
    return base, student, critic


def seen(base):
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    return base.denoise(x, torch.tensor([300, 900]), base.encode_prompts(["a red star", "a blue ring"]))


def test_each_view_is_of_one_adapter(pair):
    base, student, critic = pair
    plain = seen(load_base(TINY))
    with torch.no_grad():
        by_student = seen(base)
        with critic.learning():
            by_critic = seen(base)
        with student.off():
            by_teacher = seen(base)
        assert torch.equal(seen(base), by_student)
    torch.testing.assert_close(by_teacher, plain)
    assert not torch.allclose(by_student, by_critic) and not torch.allclose(by_critic, plain)

    alone = load_base(TINY)
    adapter = Adapter(alone.network, alone.lora_targets, rank=8, alpha=4.0, seed=9)
    adapter.load(critic.adapter.state())
    with torch.no_grad():
        torch.testing.assert_close(seen(alone), by_critic)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_each_learns_from_its_own_passes_alone(pair, again):
    """Also after the adapters were switched off as a whole, which freezes those that are not active."""
    base, student, critic = pair
    if again:
        recompute(student)
    with student.off(), torch.no_grad():
        seen(base)
    with critic.learning():
        loss = seen(base).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.adapter.parameters())
    assert all(p.grad is None for p in student.parameters())
    theirs = [p.grad.clone() for p in critic.adapter.parameters()]
    seen(base).square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(critic.adapter.parameters(), theirs, strict=True))


def test_blocks_that_are_computed_again_give_the_same_gradients(cache, tmp_path):
    gradients = []
    for again in ("false", "true"):
        run = started(tmp_path / again, data__cache=cache, train__gradient_checkpointing=again)
        disturb(run.adapter, 1)
        disturb(run.engine.critic.adapter, 2)
        batch = run.batches.at(0)[1]
        unrolled = run.engine.unrolled(batch)
        for losses in run.engine.passes(unrolled):
            losses().distance.mean().backward()
        for loss in run.engine.opponent_passes(unrolled, 0):
            loss().mean().backward()
        gradients.append([p.grad for p in (*run.adapter.parameters(), *run.engine.critic.adapter.parameters())])
    for plain, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(computed, plain, atol=1e-6, rtol=1e-4)


def test_the_critic_that_is_asked_is_its_average(pair):
    base, student, critic = pair
    config = small_config("nowhere", **TDM, objective__critic_rank=8, objective__critic_ema=0.9, base__path=TINY)
    critic.average = None
    own = load_base(TINY)
    first = Adapter(own.network, own.lora_targets, rank=4, alpha=2.0, seed=0)
    averaged = Critic(config, own, first)
    disturb(averaged.adapter, 2)
    with torch.no_grad(), averaged.asked():
        asked = seen(own)
    with torch.no_grad(), averaged.learning():
        itself = seen(own)
    torch.testing.assert_close(asked, seen(load_base(TINY)), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(asked, itself)


# --- where it starts, and what is refused


def test_student_and_critic_start_as_the_lora_that_is_given(lora, tmp_path):
    run = started(
        tmp_path, base__path=TINY, lora__init=lora, objective__phases=4, objective__critic_rank=6, train__steps=2
    )
    student, critic = run.adapter.named_parameters(), run.engine.critic.adapter.named_parameters()
    for name, weight in student.items():
        rows = critic[name][:4] if name.endswith("lora_A") else critic[name][:, :4]
        assert torch.equal(rows, weight)
        if name.endswith("lora_B"):
            assert weight.any() and not critic[name][:, 4:].any()
    with pytest.raises(ValueError, match="has rank 4, more than objective.critic_rank = 2"):
        started(tmp_path / "low", base__path=TINY, lora__init=lora, objective__phases=4, objective__critic_rank=2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data__images": "mine"}, "data.images is set, and the objective tdm learns from prompts alone"),
        ({"data__shards": '["mine.tar"]'}, "data.shards is set, and the objective tdm learns from prompts alone"),
        ({"objective__critic_warmup": 4}, "critic_warmup = 4 leaves the LoRA none of train.steps = 4 updates"),
        ({"objective__phases": 1}, "phases = 1 has no trajectory for tdm"),
        ({"objective__huber_c": 0.1}, "objective.huber_c"),
        ({"adversarial__weight": 0.1}, "the objective tdm has no adversarial loss"),
        (
            {"base__path": "digits", "data__resolution": 16, "lora__rank": None, "lora__alpha": None},
            "tdm needs a teacher",
        ),
        ({"train__shard": "true"}, "train.shard does not go with the objective tdm"),
    ],
)
def test_what_cannot_be_is_refused(changes, complaint, tmp_path, monkeypatch):
    if "train__shard" in changes:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=complaint):
        plan(small_config(tmp_path, **TDM | changes))


def test_what_the_critic_costs_is_estimated(tmp_path):
    def gib(**changes):
        settings = {"base__path": TINY, "lora__rank": 64} | changes
        return plan(small_config(tmp_path, **settings))["memory_gib"]

    own = gib(**TDM)
    larger = gib(**TDM, objective__critic_rank=128, objective__critic_ema=0.9)
    assert own["critic, gradients, optimizer"] == pytest.approx(own["LoRA, gradients, optimizer"], abs=0.002)
    wanted = 2 * 20 / 16 * own["critic, gradients, optimizer"]
    assert larger["critic, gradients, optimizer"] == pytest.approx(wanted, abs=0.004)
    assert "critic, gradients, optimizer" not in gib()


def test_what_the_critic_takes_is_said_when_memory_is_short(tmp_path):
    config = small_config(tmp_path, **TDM, base__path=TINY, lora__rank=64)
    said = explain_out_of_memory(RuntimeError("CUDA out of memory."), config, SD15)
    assert re.search(r"the critic takes 0\.\d+ GiB, which a lower objective.critic_rank lowers; train\.", said)
    assert "critic" not in explain_out_of_memory(RuntimeError("..."), small_config(tmp_path, base__path=TINY), SD15)
