"""What is `auto` in `train`: the samples of an update stay, its passes follow the memory, blocks are compiled where it
can pay, attention takes the fastest kernel, and all is decided once."""

import json
import shutil

import pytest
import torch

from phased_consistency.trainer.cli.doctor import shapes_text
from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.efficiency import memory
from phased_consistency.trainer.efficiency.footprint import footprint
from phased_consistency.trainer.efficiency.memory import TRAINING, estimate_memory, fitting_batch
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.system.machine import GIB
from phased_consistency.trainer.system.processes import Processes
from phased_consistency.trainer.training import settle as settling
from phased_consistency.trainer.training.loop import train
from phased_consistency.trainer.training.settle import fitting_shapes, settle
from support.runs import TINY, Notes, small_config

AUTO = "train.batch_size=auto"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def passes(config):
    return config.train.batch_size, config.train.accumulation


@pytest.fixture
def card(monkeypatch):
    """A GPU with this many GiB free, as a function."""

    def put(gib):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * GIB), int(gib * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)

    return put


@pytest.mark.parametrize(
    ("preset", "overrides", "samples"),
    [
        ("sdxl-4step", (AUTO,), 10),
        ("sdxl-4step", (AUTO, "train.accumulation=12"), 12),
        ("sd15-4step", (AUTO, AUTO), 20),
        (None, ("base.path=a-base", AUTO), 20),
    ],
)
def test_auto_keeps_the_samples_of_what_came_before(preset, overrides, samples):
    assert passes(load_config(overrides=overrides, preset=preset)) == ("auto", samples)


def test_a_number_over_a_files_auto_keeps_them_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "sdxl-4step"\n[train]\nbatch_size = "auto"\n')
    assert passes(load_config(str(file))) == ("auto", 10)
    assert passes(load_config(str(file), ["train.batch_size=5"])) == (5, 2)
    assert passes(load_config(str(file), ["train.batch_size=4", "train.accumulation=3"])) == (4, 3)
    with pytest.raises(ValueError, match="batch_size=4 does not divide the 10 samples .* set train.accumulation too"):
        load_config(str(file), ["train.batch_size=4"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=most", "batch_size = 'most': input should be a valid integer.*; or input should be 'auto'"),
        ("train.batch_size=0", "batch_size = 0: input should be greater than or equal to 1; or"),
        ("data.buckets=wide", "data.buckets = 'wide': input should be a valid boolean.*; or input should be a valid"),
    ],
)
def test_a_value_of_no_kind_that_a_setting_takes_is_one_problem(override, message):
    with pytest.raises(ValueError, match=f"has 1 problem:\n.*{message}"):
        load_config(overrides=["base.path=a-base", override])


@pytest.mark.parametrize("checkpointing", ["false", "true", "auto"])
def test_the_largest_that_fits_by_the_estimate(checkpointing):
    """Limits right at what each number of samples takes, and a byte below."""
    settings = [AUTO, "train.memory_limit_gib=1", f"train.gradient_checkpointing={checkpointing}"]
    config = load_config(overrides=settings, preset="sd15-4step")
    again = [*footprint(config, SD15).blocks] if checkpointing != "false" else []
    for size, smaller in ((20, 10), (10, 5), (5, 4), (4, 2), (2, 1)):
        settled = config.changed(train={"batch_size": size, "accumulation": 20 // size})
        bytes_ = sum(memory._bytes(settled, SD15, footprint(settled, SD15), again).values()) * memory.MARGIN
        assert fitting_batch(config, SD15, bytes_)[0] == size
        assert fitting_batch(config, SD15, bytes_ - 1)[0] == smaller


def test_what_is_decided_is_the_estimate_that_a_run_with_these_numbers_has():
    config = load_config(overrides=[AUTO, "train.memory_limit_gib=24"], preset="sd15-4step")
    settled, (sentence,) = settle(config, CPU)
    assert passes(settled) == (20, 1) and settled.preset == "sd15-4step"
    gib = estimate_memory(settled, SD15)["gib"][TRAINING] * memory.MARGIN
    assert sentence == (
        f"train.batch_size=auto: 1 pass of 20 an update, {gib:.1f} GiB by estimate, of 24.0 that may be filled."
    )
    assert settle(settled, CPU) == (settled, [])


def test_where_nothing_fits_it_is_one_and_that_is_said():
    config = load_config(overrides=[AUTO, "train.memory_limit_gib=1"], preset="sd15-4step")
    settled, (sentence,) = settle(config, CPU)
    assert passes(settled) == (1, 20)
    assert sentence.endswith("which is more than the 1.0 that may be filled: expect it to run out of memory.")


def test_all_processes_take_what_fits_each():
    class Two(Processes):
        def __init__(self): ...

        def least(self, number):
            return min(number, 6.5 * GIB)

    config = load_config(overrides=[AUTO, "train.memory_limit_gib=24"], preset="sd15-4step")
    settled, (sentence,) = settle(config, CPU, Two())
    assert passes(settled) == (10, 2) and "of 6.5 that may be filled; 20 at a time would take 9." in sentence


def test_without_a_gpu_it_asks_for_the_limit(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fails(2, "train", "--preset", "demo-sd15", AUTO, "--dry-run")
    assert "no CUDA device. Set train.memory_limit_gib, or train.batch_size to a number." in said


def test_the_dry_run_writes_numbers(pcm):
    result = pcm("train", "--preset", "demo-sd15", AUTO, "train.memory_limit_gib=64", "--dry-run")
    assert "batch_size = 32\naccumulation = 1\n" in result.out and "auto: 1 pass of 32 an update" in result.out
    config = json.loads(
        pcm("train", "--preset", "demo-sd15", AUTO, "train.memory_limit_gib=64", "--dry-run", "--json").out
    )["config"]
    assert (config["train"]["batch_size"], config["train"]["accumulation"]) == (32, 1)


@pytest.fixture
def begun(trained, tmp_path):
    """A copy of a finished run's folder, and its passes."""
    config = trained[0]
    return shutil.copytree(config.run_folder, tmp_path / "run"), passes(config)


def test_a_run_that_goes_on_keeps_its_passes_on_any_card(begun):
    """By the checkpoint alone: neither a GPU nor its memory is asked."""
    folder, (size, accumulation) = begun
    samples = size * accumulation
    settings = {"train__batch_size": "auto", "train__accumulation": samples, "base__path": TINY}
    config = small_config(folder, **settings)
    settled, (sentence,) = settle(config, CPU)
    assert passes(settled) == (size, accumulation)
    assert sentence.endswith(f"of {size} an update, as the run in {folder} was begun.")

    before = next(folder.glob("*-lora.safetensors")).read_bytes()
    notes = Notes()
    assert train(config, notes).read_bytes() == before
    assert sentence in notes.said

    # of another number of samples it is another run's
    other = small_config(folder, **settings | {"train__accumulation": 2 * samples}, train__memory_limit_gib=64)
    with pytest.raises(ValueError, match=f"holds a run of {samples} samples an update"):
        train(other)


def test_doctor_says_what_fits_the_card(card, monkeypatch):
    """Of one family here: the others' networks of full size take seconds."""
    monkeypatch.setattr(settling, "USUAL", ("sd15-4step",))
    card(24)
    assert "sd15-4step: 20 x 1 in 9" in shapes_text(fitting_shapes())[1]
    card(7.5)
    assert shapes_text(fitting_shapes())[1].endswith("10 x 2 in 6.3 GiB (the preset has 20 x 1)")
    card(1)
    assert "not one sample a pass" in (text := shapes_text(fitting_shapes())[1]) and "saves about" in text


def compiling(config, device=GPU, processes=None):
    """Whether `train.compile=auto` compiles, and the reason that is said."""
    settled, (sentence,) = settle(config, device, processes)
    return settled.train.compile, sentence


@pytest.fixture
def able(monkeypatch):
    """A GPU of a compute capability, where Triton works, as a function."""
    monkeypatch.setattr(settling, "compiler_problem", lambda device: "")

    def put(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    put(8, 0)
    return put


@pytest.mark.parametrize(
    ("settings", "device", "capability", "compiled", "reason"),
    [
        ([], GPU, (8, 0), True, "on, 5000 updates are ahead, in which the first minutes pay."),
        (["train.steps=499"], GPU, (8, 0), False, "off, 499 updates are ahead, and the first minutes pay from 500 on."),
        ([], CPU, (8, 0), False, "off, it pays on a CUDA GPU alone."),
        ([], GPU, (6, 1), False, "off, Triton needs a GPU of compute capability 7.0, and this one has 6.1."),
        (["base.quantize=fp8"], GPU, (7, 5), False, "off, base.quantize=fp8 needs a GPU of compute capability 8.9"),
        (["base.quantize=fp8"], GPU, (8, 9), True, "on, "),
        (["train.shard=true"], GPU, (8, 0), False, "off, it does not go with train.shard."),
        (["lora.dora=true"], GPU, (8, 0), False, "off, it does not go with lora.dora."),
    ],
)
def test_blocks_are_compiled_where_that_can_pay(able, settings, device, capability, compiled, reason):
    able(*capability)
    config = load_config(overrides=["train.compile=auto", *settings], preset="sd15-4step")
    decided, sentence = compiling(config, device)
    assert decided is compiled and sentence.startswith(f"train.compile=auto: {reason}")


def test_without_triton_it_is_off_and_says_what_to_install(able, monkeypatch):
    monkeypatch.setattr(settling, "compiler_problem", lambda device: "torch.compile does not work. Install Triton")
    decided, sentence = compiling(load_config(overrides=["train.compile=auto"], preset="sd15-4step"))
    assert not decided and sentence.endswith("off, torch.compile does not work. Install Triton.")


def test_all_processes_compile_or_none(able):
    class Two(Processes):
        def __init__(self): ...

        def least(self, number):
            return 0.0

    decided, sentence = compiling(load_config(overrides=["train.compile=auto"], preset="sd15-4step"), processes=Two())
    assert not decided and "another process of the run cannot" in sentence


def test_a_run_that_goes_on_compiles_as_before(able, begun):
    """Which was without, as that was the setting then."""
    folder, _ = begun
    config = small_config(folder, train__compile="auto", train__steps=5000, base__path=TINY)
    assert compiling(config) == (False, f"train.compile=auto: off, as the run in {folder} was begun.")


def attending(config, device=GPU, processes=None):
    """The kernel that `train.attention=auto` comes to, and the sentence on it."""
    settled, (sentence,) = settle(config, device, processes)
    return settled.train.attention, sentence


@pytest.fixture
def kernels(monkeypatch):
    """A GPU on which kernels of attention take these milliseconds, or None, as a function; returns the shapes timed."""
    timed = []

    def put(**milliseconds):
        def seconds(kernel, query, key, dtype, device):
            timed.append((tuple(query), tuple(key), dtype))
            return milliseconds[kernel] and milliseconds[kernel] / 1000

        monkeypatch.setattr(settling, "kernel_seconds", seconds)
        return timed

    return put


FASTEST = "train.attention=auto"


def test_attention_takes_the_fastest_kernel(kernels):
    """For all samples of a pass, also where they are decided in the same breath."""
    timed = kernels(flash=2, efficient=3.25, cudnn=1.5)
    kernel, sentence = attending(load_config(overrides=[FASTEST], preset="sd15-4step"))
    assert kernel == "cudnn" and set(timed) == {((20, 8, 4096, 40), (20, 8, 4096, 40), torch.bfloat16)}
    times = "cudnn 1.5 ms, flash 2 ms, efficient 3.25 ms"
    assert sentence == f"{FASTEST}: cudnn (forward and backward of 20 x 8 x 4096 x 40: {times})."

    timed.clear()
    config = load_config(overrides=[FASTEST, AUTO, "train.memory_limit_gib=7.5"], preset="sd15-4step")
    settled, sentences = settle(config, GPU)
    assert settled.train.batch_size == timed[0][0][0] == 10 and len(sentences) == 2


@pytest.mark.parametrize(
    ("settings", "device", "milliseconds", "kernel", "reason"),
    [
        (["base.dtype=fp32"], GPU, {"flash": None, "efficient": 2, "cudnn": None}, "efficient", "efficient (forward"),
        ([], GPU, {"flash": None, "efficient": None, "cudnn": None}, None, "torch's own choice, since no fused kernel"),
        ([], CPU, {}, None, "torch's own choice, it is chosen on a CUDA GPU alone."),
        (["preset=digits"], GPU, {}, None, "torch's own choice, the network has no attention."),
    ],
)
def test_without_a_choice_attention_is_torch_s(kernels, settings, device, milliseconds, kernel, reason):
    kernels(**milliseconds)
    preset = "digits" if settings == ["preset=digits"] else "sd15-4step"
    overrides = [FASTEST, *(setting for setting in settings if "preset" not in setting)]
    decided, sentence = attending(load_config(overrides=overrides, preset=preset), device)
    assert decided == kernel and sentence.startswith(f"{FASTEST}: {reason}")


def test_all_processes_take_the_kernel_that_is_best_for_the_slowest(kernels):
    class Two(Processes):
        """Beside this one, another in which flash takes 9 ms and cuDNN has no kernel."""

        def __init__(self): ...

        def least(self, number):
            return min(number, {-0.002: -0.009, -0.0015: -float("inf")}.get(number, number))

    kernels(flash=2, efficient=3.25, cudnn=1.5)
    kernel, sentence = attending(load_config(overrides=[FASTEST], preset="sd15-4step"), processes=Two())
    assert kernel == "efficient" and sentence.endswith("efficient 3.25 ms, flash 9 ms).")


def test_a_run_that_goes_on_keeps_its_kernel(kernels, begun):
    """Which was torch's own choice."""
    kernels(flash=2, efficient=3.25, cudnn=1.5)
    folder, _ = begun
    config = small_config(folder, train__attention="auto", base__path=TINY)
    assert attending(config) == (None, f"{FASTEST}: torch's own choice, as the run in {folder} was begun.")
