"""`pcm bench-gpu`: every section runs on a CPU too; what fails, waits, lacks time or hardware is a row and no crash."""

import json
import re
import time

import pytest
import torch

from phased_consistency.trainer.bench.gpu import check, fast, right, small
from phased_consistency.trainer.bench.gpu.bases import base_folder, made_of_configs
from phased_consistency.trainer.bench.gpu.section import CheckSection, Unfit, Verdict, Workplace
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.training.failure import RunFailed, RunStopped
from support.bases import BUNDLED

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def outcomes(report):
    return {row["name"]: row["outcome"] for row in report["sections"]}


def test_every_section_on_a_cpu(pcm, tmp_path):
    """Nothing fails; what a CPU can show holds; what needs a GPU, or a base of full size, says so."""
    result = pcm("bench-gpu", "--tiny", "--out", tmp_path / "out", "--limit", 3600, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    rows = {row["name"]: row for row in report["sections"]}
    assert [*rows] == [section.name for section in check.SECTIONS]

    measured = {"machine", "bench sdxl", "bench sd15", "bench sd3", "sampler overhead"}
    measured |= {name for name, switch in fast.SWITCHES.items() if not (switch.gpu or switch.again)}
    expected = dict.fromkeys(rows, "needs") | dict.fromkeys(measured, "measured")
    assert outcomes(report) == expected | {"devices agree": "holds", "resumes": "holds"}
    lacking = [row["sentence"] for row in rows.values() if row["outcome"] == "needs"]
    assert all(re.match("CUDA|full size", sentence) for sentence in lacking)

    errors = rows["devices agree"]["figures"]
    assert all(errors[f"{family} fp32"] == {"losses": 0, "gradients": 0} for family in BUNDLED)
    assert all(errors[f"{family} bf16"]["losses"] > 0 for family in BUNDLED)
    assert rows["resumes"]["figures"]["bf16"] == {"default": {"twice": True, "resumed": True}}
    for kind in ("plain", "adversarial"):
        ratios = rows["bench sdxl"]["figures"][kind]["ratios"]
        assert ratios["flops"] < 1 and ratios["peak_bytes"] < 1
    assert "off by" in rows["sdxl int8"]["sentence"]


# --- the order, the time, the report


def sections(monkeypatch, **runs):
    """Let the check consist of these sections, by name, each promised to hold and guessed to take 10 s."""
    named = tuple(CheckSection(name, 10.0, "it holds", run) for name, run in runs.items())
    monkeypatch.setattr(check, "SECTIONS", named)


def holds(place):
    return Verdict("as | promised", {"figure": 1}, True)


def raising(error):
    def run(place):
        raise error

    return run


def test_what_fails_is_a_row_and_the_next_goes_on(monkeypatch, tmp_path):
    sections(
        monkeypatch,
        fails=raising(KeyError("no\nsuch key")),
        memory=raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        broken=lambda place: Verdict("twice as slow", {}, False),
        unfit=raising(Unfit("a card of 16 GB")),
        last=holds,
    )
    lines = []
    report = check.check_gpu(tmp_path, tiny=True, say=lines.append)
    kinds = {"fails": "failed", "memory": "failed", "broken": "broken", "unfit": "needs", "last": "holds"}
    assert outcomes(report) == kinds and report["open"] == ["fails", "memory", "broken"]
    sentences = [row["sentence"] for row in report["sections"]]
    assert re.fullmatch(r"KeyError in trainer/bench/gpu/check\.py:\d+: 'no\\nsuch key'", sentences[0])
    assert sentences[1].startswith("out of memory in trainer/") and sentences[3] == "a card of 16 GB"
    assert "1 of 5 promises hold" in report["text"] and "Not seen to hold: fails, memory, broken." in report["text"]
    table = [line for line in (tmp_path / "gpu-check.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5 and {line.count("|") for line in table} == {6}
    assert re.fullmatch(r"\[ +\d+ s\] broken: broken \| twice as slow", lines[2])


def test_the_report_is_whole_after_every_section(monkeypatch, tmp_path):
    """Also when it is stopped: the rest is named as not begun."""

    def looks(place):
        report = json.loads((tmp_path / "gpu-check.json").read_text())
        assert outcomes(report) == {"first": "holds", "second": "left out", "stopped": "left out", "rest": "left out"}
        assert "not begun" in (tmp_path / "gpu-check.md").read_text()
        return holds(place)

    for stop in (KeyboardInterrupt(), RunStopped("Stopped at update 3 of 6")):
        sections(monkeypatch, first=holds, second=looks, stopped=raising(stop), rest=holds)
        with pytest.raises(KeyboardInterrupt):
            check.check_gpu(tmp_path, tiny=True)
        report = json.loads((tmp_path / "gpu-check.json").read_text())
        assert outcomes(report) == {"first": "holds", "second": "holds", "stopped": "left out", "rest": "left out"}
        assert [row["sentence"] for row in report["sections"][2:]] == ["stopped", "not begun"]
        assert report["open"] == ["stopped", "rest"]


def test_a_section_that_does_not_fit_the_time_is_left_out(monkeypatch, tmp_path):
    """By guess, and at the pace of those before: 10 s are guessed, the first takes twice that."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(place):
        clock[0] += 20
        return holds(place)

    sections(monkeypatch, first=slow, second=slow, third=slow)
    report = check.check_gpu(tmp_path, tiny=True, limit=55)
    assert outcomes(report) == {"first": "holds", "second": "holds", "third": "left out"}
    assert report["sections"][2]["sentence"] == "takes 20 s by guess, and 15 of 55 s are left"
    assert report["open"] == ["third"]


def test_sections_by_name_and_the_exit_status(monkeypatch, tmp_path, pcm):
    """0 where every promise is seen to hold, of the sections that were asked for."""
    sections(monkeypatch, first=raising(ValueError("no")), second=holds)
    assert pcm("bench-gpu", "--tiny", "--only", "second", "--out", tmp_path).code == 0
    assert outcomes(json.loads((tmp_path / "gpu-check.json").read_text())) == {"second": "holds"}
    result = pcm("bench-gpu", "--tiny", "--out", tmp_path)
    assert result.code == 1 and "Not seen to hold: first." in result.out and "] second: holds" in result.err


def test_mistakes_are_sentences(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no section 'bench sdx'; available: machine, devices agree,"):
        check.check_gpu(tmp_path / "out", tiny=True, only=["bench sdx"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA GPU.*--tiny"):
        check.check_gpu(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what a section makes of what it measures


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A workplace that believes in a GPU, on which nothing is run."""
    monkeypatch.setattr(Workplace, "clean", lambda self: None)
    monkeypatch.setattr(Workplace, "config", lambda self, *settings: settings)
    monkeypatch.setattr(Workplace, "half", "bf16")
    return Workplace(tmp_path, GPU, tiny=False, ceilings={"matmul": 800e12, "copy": 4e12})


def updates(seconds, speed=None, memory=0.5):
    """What `bench` says of an update of SDXL that takes so long, beside a reference, if there is one."""
    ours = {"updates_per_second": 1 / seconds, "samples_per_second": 2 / seconds, "flops_per_update": 88e12}
    ours |= {"utilisation": 0.2, "host_seconds": seconds / 2, "peak_bytes": 2**30}
    return {"ours": ours} | ({"ratios": {"updates_per_second": speed, "peak_bytes": memory}} if speed else {})


@pytest.mark.parametrize(
    ("plain", "adversarial", "promised"),
    [
        (updates(0.4, 1.5), updates(0.5, 2.0), True),
        (updates(0.4, 0.9), updates(0.5, 2.0), False),
        (updates(0.4, 1.5), updates(0.5, 2.0, memory=1.2), False),
        (updates(0.7, 1.5), updates(0.8, 2.0), False),  # 88 TFLOP and 361 GiB may take 1.5 times 0.33 s
    ],
)
def test_updates_are_held_to_the_reference_and_to_their_count(monkeypatch, on_gpu, plain, adversarial, promised):
    monkeypatch.setattr(fast, "bench", lambda *_, **__: {"plain": plain, "adversarial": adversarial})
    verdict = fast.beside_reference(on_gpu, "sdxl")
    assert verdict.holds is promised
    assert verdict.figures["allowed_seconds"] == pytest.approx(1.5 * (88 / 440 + 361 * 2**30 / 3e12))
    assert "host busy 50%" in verdict.sentence and "20% of its data sheet" in verdict.sentence


def test_a_reference_that_does_not_fit_is_left_out(monkeypatch, on_gpu):
    def bench(config, *, reference, **_):
        if reference or config[0].startswith("sd3"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"plain": updates(0.4), "adversarial": updates(0.5)}

    monkeypatch.setattr(fast, "bench", bench)
    verdict = fast.beside_reference(on_gpu, "sdxl")
    assert verdict.holds is True and verdict.sentence.count("the reference loop is out of memory") == 2
    with pytest.raises(Unfit, match="more memory than this card has"):
        fast.beside_reference(on_gpu, "sd3")
    with pytest.raises(Unfit, match="more memory than this card has"):
        fast.switched(on_gpu, "sd3 B=2")


def test_a_run_that_does_not_fit_is_a_broken_promise(monkeypatch, on_gpu):
    def train(config, reporter):
        raise RunFailed("CUDA out of memory.\nBy estimate: train.offload=true saves 2 GiB.")

    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    card = type("Card", (), {"total_memory": 30 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(small, "train", train)
    verdict = small.fits(on_gpu, "sd3 in 16 GB")
    assert verdict.holds is False and "15.00 GiB are not enough: CUDA out of memory." in verdict.sentence
    assert fractions == [0.5, 1.0]
    card.total_memory = 12 * 2**30
    with pytest.raises(Unfit, match="a card of 16 GB"):
        small.fits(on_gpu, "sd3 in 16 GB")


@pytest.mark.parametrize(
    ("default", "deterministic", "promised", "sentence"),
    [
        ((True, True), None, True, "bf16 the same bytes;"),
        ((True, False), None, False, "bf16 OTHER BYTES;"),
        ((False, False), (True, True), True, "the same bytes with deterministic algorithms; two whole runs differ"),
        ((False, False), (True, False), False, "OTHER BYTES with deterministic algorithms"),
        ((False, False), (False, False), False, "OTHER BYTES, as two whole runs differ"),
    ],
)
def test_runs_that_go_on_are_held_to_whole_ones(monkeypatch, on_gpu, default, deterministic, promised, sentence):
    def resumed(place, dtype, **ways):
        return dict(zip(("twice", "resumed"), deterministic if ways else default, strict=True))

    monkeypatch.setattr(right, "_resumed", resumed)
    verdict = right.resumes(on_gpu)
    assert verdict.holds is promised and sentence in verdict.sentence


def test_a_card_without_bf16_is_tried_in_fp16(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    turing = Workplace(tmp_path, GPU, tiny=False)
    assert turing.config("sdxl-4step").base.dtype == turing.tiny_config("sd15-4step").base.dtype == "fp16"
    assert Workplace(tmp_path, CPU, tiny=True).config("sdxl-4step").base.dtype == "bf16"

    monkeypatch.setattr(right, "_resumed", lambda *_, **__: {"twice": True, "resumed": True})
    figures = right.resumes(turing).figures
    assert figures["bf16"] == "needs a newer card" and figures["fp16"] == {"default": {"twice": True, "resumed": True}}


def test_devices_that_do_not_agree(monkeypatch, on_gpu):
    def losses(place, family, dtype, device):
        off = 2e-3 if (family, dtype, device) == ("sd3", "fp32", GPU) else 0.0
        return torch.ones(3), torch.ones(5) + off

    monkeypatch.setattr(right, "_losses_and_gradients", losses)
    verdict = right.devices_agree(on_gpu)
    assert verdict.holds is False and verdict.figures["sd3 fp32"]["gradients"] == pytest.approx(2e-3, rel=1e-3)


# --- bases without files


@pytest.mark.parametrize("family", BUNDLED)
def test_a_base_made_of_configs(tmp_path, family):
    """Random weights, the same each time, through which numbers go at their size; others are loaded as ever."""
    folder = str(base_folder(family, tmp_path, speck=True))
    with made_of_configs(tmp_path):
        base, again = load_base(folder), load_base(folder)
        assert load_base(BUNDLED[family]).base_hash != base.base_hash == again.base_hash
    for name, weight in base.network.named_parameters():
        assert torch.equal(weight, again.network.get_parameter(name))
    condition = base.encode_prompts(["a picture of a cat"])
    x = torch.randn(1, *base.latent_shape(32))
    with torch.no_grad():
        output = base.denoise(x, torch.tensor([500]), condition)
    assert 0.1 < output.std() < 10
    assert 0.1 < condition["hidden"][..., :64].std() < 10
