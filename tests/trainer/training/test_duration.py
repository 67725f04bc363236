"""How long a run will take: operations as they are counted on full-size updates, and what is said before and after."""

import json

import pytest
import torch

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.efficiency import work
from phased_consistency.trainer.efficiency.footprint import CountedPass
from phased_consistency.trainer.efficiency.work import Work, product_speed, work_of
from phased_consistency.trainer.families import load_base, look_at_base
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.reporting.log import read_log
from phased_consistency.trainer.reporting.progress import roughly
from phased_consistency.trainer.reporting.story import Story
from phased_consistency.trainer.training import duration
from phased_consistency.trainer.training.duration import expected_duration, flops_of_sample
from support.runs import TINY, small_config

CPU = torch.device("cpu")


@pytest.fixture
def fast(monkeypatch):
    """A GPU of 100 TFLOP/s in products, of which updates reach half."""
    monkeypatch.setattr(duration, "usual_speed", lambda device, dtype: (100e12, 0.5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    return torch.device("cuda")


# (preset, settings) -> TFLOP of one pass of an update, as `pcm bench --count` has them (docs/measurements/speed.md)
COUNTED = {
    ("sd15-4step",): 107.1,
    ("sdxl-4step",): 88.1,
    ("sdxl-4step", "train.gradient_checkpointing=false"): 74.0,
    ("sdxl-4step-adv",): 111.0,
    ("sd3-4step",): 111.0,
    ("sd3-4step-adv",): 161.6,
}


@pytest.mark.parametrize("settings", COUNTED, ids=" ".join)
def test_operations_are_those_of_full_size_updates(settings):
    """But for the LoRA's own."""
    preset, *overrides = settings
    config = load_config(overrides=overrides, preset=preset)
    family = look_at_base(config.base.path, **config.base.reading()).family
    tera = config.train.batch_size * flops_of_sample(config, family) / 1e12
    assert COUNTED[settings] * 0.92 < tera < COUNTED[settings]


@pytest.mark.parametrize(("path", "prompt"), [("tiny-sd15", "a red star"), ("tiny-sdxl", ""), ("tiny-emoji", "a fox")])
def test_a_pass_is_told_as_many_tokens_as_the_base_encodes(path, prompt):
    """An SD3 without T5 fewer than one with it."""
    base = load_base(path)
    config = load_config(overrides=[f"base.path={path}", "data.resolution=64"])
    counted = CountedPass.of(config, type(base)).inputs()
    assert counted["encoder_hidden_states"].shape == base.encode_prompts([prompt])["hidden"].shape
    assert counted["encoder_hidden_states"].shape[1] == base.facts.tokens


def test_a_backward_pass_computes_attention_anew_and_goes_to_weights_that_are_trained():
    one = Work(products=100, attention=10, launches=1)
    assert one.forward == 110 and one.backward() == 125 and one.backward(whole=True) == 225


def test_a_runs_time_is_that_of_its_operations(fast):
    """5000 updates of 20 samples, half of 100 TFLOP/s, measuring on top; before, 1000 latents in 25 guided steps."""
    config = load_config(preset="sd15-4step")
    each = flops_of_sample(config, SD15)
    time = expected_duration(config, SD15, fast, measuring=0.1)
    assert time.update == pytest.approx(20 * each / 50e12)
    assert time.caching == pytest.approx(1000 * 25 * 2 * work_of(config, SD15).forward / 50e12)
    assert time.seconds == pytest.approx(time.caching + 5000 * 1.1 * time.update)
    assert time.flops == pytest.approx(time.seconds * 50e12)

    later = expected_duration(config, SD15, fast, measuring=0.1, step=4000)
    assert later.seconds == pytest.approx(1000 * 1.1 * time.update) and later.caching == 0
    halves = load_config(overrides=["train.batch_size=10", "train.accumulation=2"], preset="sd15-4step")
    assert expected_duration(halves, SD15, fast, measuring=0.1).seconds == pytest.approx(time.seconds)
    words = time.sentence(fast)
    assert words.startswith(f"about {roughly(time.seconds)} on NVIDIA Test; {roughly(time.caching)} of it for the")
    assert "at 50% of the 100 TFLOP/s that it reaches" in words and "the first updates will tell better" in words


def test_a_small_network_waits_for_the_host(fast, tmp_path):
    """4 passes and a backward of two, of as many operations as the network has."""
    config = small_config(tmp_path, base__path=TINY, objective__guidance=[2.0, 2.0])
    time = expected_duration(config, SD15, fast, measuring=0.0)
    each = (4 + 2) * work_of(config, SD15).launches * work.LAUNCH
    assert time.update == pytest.approx(each * config.train.accumulation)


def test_a_device_without_memory_is_not_measured(monkeypatch, tmp_path):
    def full(device, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(duration, "usual_speed", full)
    config = small_config(tmp_path, base__path=TINY)
    assert expected_duration(config, SD15, CPU, measuring=0.0) is None
    monkeypatch.setattr("phased_consistency.trainer.training.plan.expected_duration", expected_duration)
    from phased_consistency.trainer.training.plan import plan

    told = plan(config)
    assert told["expected"] is None and "time      not estimated: the GPU has no memory free" in told["text"]


def test_a_speed_is_of_products_that_were_made():
    assert 1e6 < product_speed(CPU, torch.float32, side=64) < 1e14


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "a second"), (1.26, "1.3 s"), (90, "90 s"), (125, "2.1 min"), (3599, "60 min"), (7000, "1.9 h"),
        (40 * 3600, "40 h"), (400 * 3600, "17 days"),
    ],
)  # fmt: skip
def test_rough_times_have_a_digit_or_two(seconds, words):
    assert roughly(seconds) == words


def test_the_dry_run_says_how_long(pcm):
    result = pcm("train", "--preset", "demo-sd15", "--dry-run", "--json")
    expected = json.loads(result.out)["expected"]
    assert expected["seconds"] > expected["caching"] > 0 < expected["update"] and expected["share"] == 0.5
    assert "time      about" in json.loads(result.out)["text"]


def test_a_run_says_and_notes_what_it_expects(trained):
    """The report has it beside what the run took."""
    folder = trained[0].run_folder
    start = next(line for line in read_log(folder) if line["kind"] == "start")
    assert start["expected seconds"] > 0
    assert ("expected of the last start, before it", f"about {roughly(start['expected seconds'])}") in [
        *Story.of(folder).costs()
    ]
