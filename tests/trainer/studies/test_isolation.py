"""Consistency training from nothing: the drawn digits, the network that learns them whole, and what it has not."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from phased_consistency.samplers import VPSchedule
from phased_consistency.samplers.lora_file import read_header
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.families import family_of, load_base
from phased_consistency.trainer.families.pixels import MEAN as GREY
from phased_consistency.trainer.families.pixels import SPREAD
from phased_consistency.trainer.lora.adapter import Average, Whole
from phased_consistency.trainer.objectives import CT
from phased_consistency.trainer.studies import isolation
from phased_consistency.trainer.tiny.digits import Digit, drawn_digits, random_digit
from phased_consistency.trainer.training.engine import Batch, Engine
from phased_consistency.trainer.training.loop import train
from support.closed_form import MEAN, STD, Gaussian
from support.runs import settings, sha256

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


# What the preset decides, or a network that is trained whole has not, in place of a small run's settings.
DIGITS = {"data__count": 40, "train__batch_size": 4, "train__steps": 6} | dict.fromkeys(
    (
        "base__path",
        "base__dtype",
        "data__teacher_steps",
        "data__teacher_guidance",
        "data__resolution",
        "data__batch_size",
        "lora__rank",
        "lora__alpha",
        "objective__guidance",
        "train__lr",
        "validation__every",
    )
)


def digits(output, **changes):
    """Overrides of a small run from nothing."""
    return settings(output, **DIGITS | changes)


def small(output, **changes):
    return load_config(overrides=digits(output, **changes), preset="digits")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small run from nothing, finished, with every checkpoint kept; its configuration and its folder."""
    config = small(tmp_path_factory.mktemp("digits") / "run", train__save_every=2, train__keep_checkpoints=9)
    return config, train(config)


# --- the drawings


def test_the_same_numbers_give_the_same_drawing():
    one, again, other = (random_digit(n, seed).load(16)[0] for n, seed in ((23, 0), (23, 0), (23, 1)))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({random_digit(n).content() for n in range(100)}) == 100
    assert drawn_digits(5) == drawn_digits(9)[:5]


def test_drawings_are_whole_and_light_on_dark():
    pixels = torch.stack([d.load(16)[0] for d in drawn_digits(500)])
    assert pixels.shape == (500, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    border = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], -1)
    assert (border < -0.9).float().mean() > 0.97, "hardly any touches the border"
    latents = (pixels - GREY) / SPREAD
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1, "about zero mean and unit spread"


def test_captions_say_what_is_drawn():
    """Every drawing is nearest to the drawing, upright and centred, that the digit of its caption has."""
    plain = [[Digit(str(d), 0, 0, h, s, 0, 0).load(16)[0][0] for h in (0.66, 0.73, 0.8) for s in (0, 0.025, 0.05)]
             for d in range(10)]  # fmt: skip
    flat = torch.stack([torch.stack(row) for row in plain]).flatten(2)
    upright = [Digit(d.caption, 0, 0, d.height, d.stroke, 0, 0) for d in drawn_digits(200)]
    drawn = torch.stack([d.load(16)[0][0] for d in upright]).flatten(1)
    nearest = torch.cdist(drawn, flat.flatten(0, 1)).view(len(drawn), 10, -1).amin(2).argmin(1)
    assert [str(n) for n in nearest.tolist()] == [d.caption for d in drawn_digits(200)]


@pytest.mark.parametrize(
    ("changed", "axis", "sign"), [({"x": 0.1}, 1, 1), ({"y": 0.1}, 0, 1), ({"x": -0.1}, 1, -1), ({"y": -0.1}, 0, -1)]
)
def test_a_drawing_is_where_it_says(changed, axis, sign):
    def centre(digit):
        ink = digit.load(64)[0][0].add(1)
        return (ink.sum(1 - axis) * torch.arange(64)).sum() / ink.sum()

    plain = Digit("8", 0, 0, 0.6, 0, 0, 0)
    moved = Digit(**(vars(plain) | changed))
    assert centre(moved) - centre(plain) == pytest.approx(sign * 6.4, abs=0.3)


# --- the base


def test_the_base_is_always_the_same_and_its_latents_are_pictures():
    base, again = load_base("digits"), load_base("digits")
    assert all(torch.equal(a, b) for a, b in zip(base.network.parameters(), again.network.parameters(), strict=True))
    assert family_of("digits") == "pixels" and base.untrained and base.base_hash == again.base_hash
    assert sum(p.numel() for p in base.network.parameters()) < 1_000_000
    pixels = torch.stack([d.load(16)[0] for d in drawn_digits(3)])
    latents, spread = base.encode_images(pixels)
    assert spread is None and latents.shape[1:] == base.latent_shape(16)
    torch.testing.assert_close(base.decode(latents), (pixels + 1) / 2)


def test_prompts_are_digits():
    base = load_base("digits")
    assert base.encode_prompts(["3", "", "0"])["label"].tolist() == [3, 10, 0]
    with pytest.raises(ValueError, match="'a cat' is no prompt of digits: it knows the digits 0, 1"):
        base.encode_prompts(["a cat"])


# --- the run


def test_it_saves_what_it_trained(whole):
    """The folder holds the trained weights, loads as a base, and differs from where the run began."""
    config, path = whole
    assert path == config.run_folder / "digits" and family_of(str(path)) == "pixels"
    trained, fresh = load_base(str(path)), load_base("digits")
    assert not trained.untrained and trained.base_hash != fresh.base_hash
    pairs = zip(trained.network.parameters(), fresh.network.parameters(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in pairs) > 0.95 * len(list(fresh.network.parameters()))
    metadata = read_header(path / WEIGHTS).metadata
    assert metadata["pcm.step"] == "6" and json.loads(metadata["pcm.config"])["objective"]["name"] == "ct"


def test_a_stopped_run_ends_in_the_same_bytes(whole, tmp_path):
    config, path = whole
    part = small(tmp_path / "run", train__save_every=2, train__keep_checkpoints=9)
    shutil.copytree(config.run_folder, part.run_folder)
    shutil.rmtree(part.run_folder / path.name)
    for checkpoint in sorted((part.run_folder / "checkpoints").iterdir())[1:]:
        checkpoint.unlink()
    assert sha256(train(part) / WEIGHTS) == sha256(path / WEIGHTS)


def test_checkpointed_gradients_are_the_same(whole, tmp_path):
    again = load_file(train(small(tmp_path / "run", train__gradient_checkpointing="true")) / WEIGHTS)
    assert all(torch.allclose(again[name], w, atol=1e-5) for name, w in load_file(whole[1] / WEIGHTS).items())


def test_train_and_sample_end_to_end(pcm, tmp_path):
    trained = pcm("train", "--preset", "digits", *digits(tmp_path / "run", train__steps=2, preview__every=1), "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["base"] == str(tmp_path / "run" / "digits")
    assert "weights of the network are trained" in trained.err
    assert float(re.search(r"max difference (\S+) when read again", trained.err)[1]) < 1e-5
    assert all((tmp_path / "run" / f).is_file() for f in ("previews/step-0000001.png", "digits.preview.png"))
    options = ["--base", tmp_path / "run" / "digits", "--prompt", "3", "--steps", "1,2", "--out"]
    drawn = json.loads(pcm("sample", *options, tmp_path / "grid.png", "--json").out)
    assert [(r["guidance"], r["gamma"]) for r in drawn["rows"]] == [(1, 1), (1, 1)], "as a consistency model is sampled"
    assert drawn["warnings"] == [] and (tmp_path / "grid.png").is_file()


def test_the_dry_run_tells_that_the_network_is_trained(pcm, tmp_path):
    plan = json.loads(pcm("train", "--preset", "digits", "--dry-run", "--json").out)
    assert plan["lora_modules"] == 0 and plan["trained_parameters"] == sum(
        p.numel() for p in load_base("digits").network.parameters()
    )
    assert plan["forward_passes_per_sample"] == 2 and plan["output"].endswith("digits/digits")


def test_the_report_tells_drawings_from_noise(whole, tmp_path, capsys):
    assert isolation.main([str(whole[1].parent), "--pictures", "50", "--out", str(tmp_path / "stages.png")]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [r[0] for r in rows] == ["| drawings"] + [f"| {n} updates" for n in (2, 4, 6) for _ in isolation.STEPS]
    right, distance = zip(*((float(r[2].rstrip("%")), float(r[3].rstrip(" |"))) for r in rows), strict=True)
    assert right[0] > 90 > 50 > max(right[1:]) and distance[0] < 0.5 * min(distance[1:])
    assert (tmp_path / "stages.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "pcm"}, "pcm needs a teacher, and digits starts from nothing: use objective.name=ct"),
        (
            {"objective.name": "ufogen", "adversarial.weight": 0.1},
            "the adversarial loss needs a teacher, and digits starts from nothing",
        ),
        ({"lora.rank": 8, "lora.alpha": 8}, "lora.alpha, lora.rank: there is no LoRA, digits is trained whole."),
        ({"data.resolution": 18}, "resolution 18 is not a multiple of 4"),
        ({"base.prediction": "epsilon"}, "base.prediction is not for a network for small pictures. Leave it out."),
        ({"base.family": "sd15"}, "digits is a network for small pictures, base.family is sd15. Use the preset digits"),
        ({"preview.prompts": '["a cat"]'}, "'a cat' is no prompt of digits"),
    ],
)
def test_what_it_has_not(changes, message, tmp_path):
    overrides = [*digits(tmp_path / "run"), *(f"{k}={v}" for k, v in changes.items())]
    with pytest.raises(ValueError, match=re.escape(message)):
        train(load_config(overrides=overrides, preset="digits"))


def test_prompts_alone_are_not_enough(tmp_path):
    config = load_config(overrides=["base.path=digits", "base.dtype=fp32", "objective.name=ct", "data.resolution=16"])
    with pytest.raises(ValueError, match="data.images is not set, and digits has no teacher that makes pictures"):
        train(config.model_copy(update={"output": str(tmp_path)}))


def test_an_untrained_network_is_not_sampled(fails, tmp_path):
    error = fails(2, "sample", "--base", "digits", "--prompt", "3", "--out", tmp_path / "grid.png")
    assert "digits is a network with random weights. Train it (pcm train --preset digits)" in error


def test_a_lora_is_not_taken(fails, lora, whole, tmp_path):
    options = ["--base", whole[1], "--prompt", "3", "--out", tmp_path / "grid.png", "--lora", lora]
    assert "is a LoRA for SD1.5" in fails(2, "sample", *options)


def test_there_is_no_teacher():
    with (
        pytest.raises(ValueError, match="There is no teacher: all weights of the network are trained"),
        Whole(nn.Linear(1, 1)).off(),
    ):
        pass


# --- the truth


class Line(nn.Module):
    """v of one number, from the number and its level: what `Pixels` is to pictures."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, alpha, sigma):
        return self.layers(torch.stack([x, alpha, sigma], 1)).squeeze(1)


class LineBase:
    prediction = "v_prediction"

    def __init__(self, schedule):
        self.schedule, self.network, self.device = schedule, Line(), torch.device("cpu")

    def denoise(self, x, tick, condition):
        return self.network(x.flatten(), self.schedule.alpha(tick), self.schedule.sigma(tick)).view_as(x)


def test_from_nothing_to_the_exact_map_of_a_gaussian():
    """The consistency function of N(m, s^2) is known: x goes to m + s (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2)."""
    schedule = VPSchedule.from_betas()
    base = LineBase(schedule)
    learner = Whole(base.network)
    objective = CT(curriculum="ict", s0=10, s1=80)
    engine, average = Engine(base, learner, objective, {}), Average(learner, 0.99)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    generator, updates, count = torch.Generator().manual_seed(0), 1500, 256

    def error():
        """Root mean square distance from the exact map, from noise and from half-way."""
        exact, found = Gaussian(schedule, STD), []
        for level in (1000, 500):
            tick, z = torch.full((512,), level), torch.linspace(-2, 2, 512).view(-1, 1, 1, 1)
            alpha, sigma = exact.level(tick)
            x = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z
            with torch.no_grad():
                x0 = alpha * x - sigma * base.denoise(x, tick, {})
            found.append((x0 - exact.flow(x, tick, torch.zeros_like(tick))).square().mean().sqrt().item())
        return max(found)

    before = error()
    for step in range(updates):
        x0 = MEAN + STD * torch.randn(count, 1, 1, 1, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        levels = objective.levels(count, schedule, step / updates, generator)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / updates)
        optimizer.zero_grad()
        engine.step(Batch(x0, noise, levels, None, {}, step / updates)).distance.mean().backward()
        optimizer.step()
        average.update(step + 1)
    with learner.using(average.weights):
        after = error()
    assert before > 0.5 and after < 0.05, (before, after)
