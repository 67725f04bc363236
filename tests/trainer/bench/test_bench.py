"""`pcm bench`: a reference loop that learns what ours learns, counts that theory knows, figures that add up."""

import json
import time

import pytest
import torch

from phased_consistency.trainer.bench.comparison import Loop
from phased_consistency.trainer.bench.measure import (
    BACKWARD,
    FIRST_BLOCKS,
    GRADIENT,
    IMAGES,
    NO_GRADIENT,
    PASSES,
    PROMPTS,
    alive_bytes,
    flops,
    passes_counted,
    peak_bytes,
)
from phased_consistency.trainer.bench.reference import Reference
from phased_consistency.trainer.bench.report import peak_flops
from phased_consistency.trainer.reporting.progress import Reporter
from phased_consistency.trainer.training.loop import Run
from support.runs import TINY, settings, small_config

CPU = torch.device("cpu")
SAMPLES = 4
ADVERSARIAL = {"adversarial__weight": 0.5, "adversarial__width": 32}


@pytest.fixture(scope="module", params=["plain", "adversarial"])
def loops(request, tmp_path_factory):
    """Our run and the reference beside it, with one LoRA that is not the identity, on 8 points of 2 phases."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"objective__points": 8, "objective__phases": 2, "train__batch_size": SAMPLES, "train__steps": 20}
    changes["data__teacher_steps"] = 4
    adversarial = ADVERSARIAL if request.param == "adversarial" else {}
    run = Run(small_config(folder / "run", base__path=TINY, **changes, **adversarial), Reporter())
    generator = torch.Generator().manual_seed(1)
    weights = {n: 0.1 * torch.randn(w.shape, generator=generator) for n, w in run.adapter.state().items()}
    other = Reference(run)
    for adapter in (run.adapter, other.adapter):
        adapter.load(weights)
    yield run, other
    run.updater.coming.close()


def same_gradients(a: torch.Tensor, of_a, b: torch.Tensor, of_b) -> bool:
    """Whether two losses have the same gradients in as many weights, within the rounding of batches that are
    split otherwise: in each weight, but for those with next to none of the gradient, such as a query's where
    there is one place to look at."""
    ours, theirs = (torch.autograd.grad(x.mean(), list(of), retain_graph=True) for x, of in ((a, of_a), (b, of_b)))
    whole = torch.cat([g.flatten() for g in ours]).norm()
    return whole > 0 and all((x - y).norm() < 1e-3 * x.norm() + 1e-5 * whole for x, y in zip(ours, theirs, strict=True))


def batches(run, *numbers):
    return [run.batches.at(n)[1].to(CPU) for n in numbers]


def test_both_loops_learn_the_same(loops):
    """On one batch: every loss, and the gradient of what it teaches."""
    run, other = loops
    (batch,) = batches(run, 0)
    ours, theirs = run.engine.step(batch), other.losses(batch)
    expected = ours.distance
    if run.engine.adversary:
        expected = expected + 0.5 * ours.generator
        losses = other.losses(batch, "discriminator")
        torch.testing.assert_close(losses, ours.discriminator, rtol=1e-4, atol=1e-5)
        heads = run.engine.adversary.heads.parameters(), other.heads.parameters()
        assert same_gradients(ours.discriminator, heads[0], losses, heads[1])
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-6)
    assert theirs.min() > 1e-3
    assert same_gradients(expected, run.adapter.parameters(), theirs, other.adapter.parameters())


def test_the_reference_encodes_our_samples(loops):
    """Prompts as the cache has them, in half precision; the draws are ours, and the pictures the latents' own."""
    run, other = loops
    other.drawn = 0
    other.prepare(1)
    inputs = next(other.inputs)
    (ours,), theirs = batches(run, 0), other.encoded(inputs)
    for name, rows in ours.condition.items():
        torch.testing.assert_close(theirs.condition[name], rows, atol=5e-3, rtol=5e-3)
    assert torch.equal(theirs.noise, ours.noise) and torch.equal(theirs.levels.u, ours.levels.u)
    assert inputs.pixels.shape == (SAMPLES, 3, 32, 32) and -1 <= inputs.pixels.min() < 0 < inputs.pixels.max() <= 1
    apart = (theirs.x0 - ours.x0).flatten(1).norm(dim=1) / (theirs.x0 - ours.x0.roll(1, 0)).flatten(1).norm(dim=1)
    assert (apart < 0.6).all()


def test_passes_are_those_of_theory(loops):
    """For each sample: a guided teacher's 2, the target's where r > s, the student's; the reference's D and G apart."""
    run, other = loops
    adversarial = run.engine.adversary is not None
    inner = sum(int((b.levels.r > b.levels.s).sum()) for b in batches(run, run.step, run.step + 1))
    assert 0 < inner < 2 * SAMPLES
    with passes_counted([run.base]) as ours:
        run.update()
        run.update()
    assert ours[NO_GRADIENT] + ours[GRADIENT] == 2 * SAMPLES * (3 + 2 * adversarial) + inner
    assert ours[GRADIENT] == ours[BACKWARD] == 2 * SAMPLES * (1 + adversarial)
    assert ours[FIRST_BLOCKS] == 2 * SAMPLES * 2 * adversarial
    assert ours[IMAGES] == ours[PROMPTS] == 0
    other.prepare(1)
    with passes_counted([other.teacher, other.student]) as theirs:
        other.update()
    expected = {NO_GRADIENT: 3, GRADIENT: 1, FIRST_BLOCKS: 0, BACKWARD: 1, IMAGES: 1, PROMPTS: 1}
    if adversarial:
        expected = {NO_GRADIENT: 8, GRADIENT: 3, FIRST_BLOCKS: 3, BACKWARD: 2, IMAGES: 2, PROMPTS: 2}
    assert {name: theirs[name] / SAMPLES for name in PASSES} == expected
    assert other.loss > 0


def test_both_loops_take_steps(loops):
    """Every weight that learns has moved after an update, in either loop."""
    run, other = loops
    for learners, update in (
        (run.trained.optimizer.param_groups, run.update),
        ([{"params": parameters} for parameters in other.learners.values()], other.update),
    ):
        parameters = [p for group in learners for p in group["params"] if p.ndim > 1]
        before = [p.detach().clone() for p in parameters]
        other.prepare(1)
        update()
        assert all(not torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_the_parts_are_the_whole_time(loops):
    run, other = loops
    for loop in (
        Loop(run.update, lambda _: None, run.clock, [], [], CPU),
        Loop(other.update, other.prepare, other.clock, [], [], CPU),
    ):
        loop.prepare(2)
        started = time.perf_counter()
        loop.clock.reset()
        loop.update()
        loop.update()
        parts, whole = loop.clock.seconds(), time.perf_counter() - started
        assert sum(parts.values()) == pytest.approx(whole, rel=0.02, abs=2e-3)
        names = {"data", "teacher", "target", "student", "backward", "optimizer", "other"}
        assert parts.keys() == names | ({"discriminator"} if run.engine.adversary else set())
        assert parts["other"] < 0.5 * whole
        loop.round(2)
        assert loop.seconds == [pytest.approx(sum(loop.rounds[0].values()))]


def test_operations_and_bytes_have_closed_forms():
    x, w = torch.zeros(64, 32), torch.zeros(32, 16, requires_grad=True)
    assert flops(lambda: (x @ w).sum().backward()) == 2 * 2 * 64 * 32 * 16  # the product, and the weight's gradient

    def run():
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500).add_(1)  # one at a time
        return kept.add_(x[0, 0]).view(10, 100)

    assert peak_bytes(run, CPU) == 4 * 1500
    before = alive_bytes(CPU)
    tensor = torch.zeros(2000, requires_grad=True)
    views = [tensor[:10], tensor.view(2, 1000)]
    tensor.sum().backward()
    assert alive_bytes(CPU) - before == 4 * (2000 + 2000)  # with its gradient; a view holds nothing
    del views


def test_peaks_are_of_the_whole_name(monkeypatch):
    named = {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12, "NVIDIA GeForce RTX 4090": 165e12}
    unknown = ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 3090 Ti", "AMD MI300X")
    for name, peak in [*named.items(), *((name, None) for name in unknown)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(CPU) is None


def bench_settings(folder, **changes):
    """Every solver point is an edge, so that no target needs a pass."""
    small = {"objective__points": 4, "objective__phases": 4, "train__batch_size": 2, **changes}
    return settings(folder / "run", **small)


def test_bench_as_json_and_in_words(pcm, tmp_path):
    out = tmp_path / "out"
    options = ("--updates", 2, "--warmup", 1, "--out", out, "--json")
    result = pcm("bench", *bench_settings(tmp_path, **ADVERSARIAL), *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == json.loads((out / "bench.json").read_text())
    assert report["settings"]["batch_size"] == 2 and report["machine"]["torch"] == torch.__version__
    for kind, ours, theirs in (("plain", 2, 3), ("adversarial", 3, 8)):
        for name, passes in (("ours", ours), ("reference", theirs)):
            loop = report[kind][name]
            assert loop["passes_per_sample"][NO_GRADIENT] == passes
            assert loop["samples_per_second"] == pytest.approx(2 * loop["updates_per_second"])
            assert sum(loop["milliseconds"].values()) * loop["updates_per_second"] == pytest.approx(1000)
            assert loop["utilisation"] is None and loop["peak_bytes"] > 0 and loop["flops_per_update"] > 0
        ratios = report[kind]["ratios"]
        assert 0 < ratios["least"] <= ratios["updates_per_second"] <= ratios["greatest"]
        assert ratios["flops"] < 1 and ratios["peak_bytes"] < 1
    text = (out / "bench.txt").read_text()
    assert text.count("student updates/s") == 2 and "our time: data" in text
    assert not (tmp_path / "run").exists(), "nothing of the run is kept"


def test_bench_of_our_loop_alone(pcm, tmp_path):
    lcm = bench_settings(tmp_path, objective__name="lcm", objective__phases=None)
    result = pcm("bench", *lcm, "--updates", 1, "--warmup", 1, "--no-reference")
    assert result.code == 0, result.err
    assert "student updates/s" in result.out and "reference" not in result.out


def test_mistakes_are_sentences(fails, tmp_path):
    message = fails(2, "bench", *bench_settings(tmp_path, objective__name="lcm", objective__phases=None))
    assert "objective.name is lcm" in message and "--no-reference" in message
    assert "train.stepz: unknown key" in fails(2, "bench", "train.stepz=3")
