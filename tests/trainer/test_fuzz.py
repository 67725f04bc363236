"""Files that others made: a part of the fuzz run (`python -m support.fuzzing`), and each defect that it found."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from phased_consistency.samplers.known_files import recipe_for_file
from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_modules import LoraModule
from phased_consistency.samplers.recipe import Recipe
from phased_consistency.samplers.writing import path_within
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.check import check_parity
from phased_consistency.trainer.lora.describe import describe, describe_text
from phased_consistency.trainer.lora.install import install_whole, load_for_check
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.tiny.bundled import bundled_folder
from support.fuzz.tensors import DEEP, Tensors
from support.runs import TINY
from support.sharing_files import kohya_file

TOO_DEEP = "(recursion|Stack overflow)"  # as Python says it, from 3.14 on the latter
TESTS = Path(__file__).parents[1]  # where `python -m support.fuzzing` is run
TARGETS = ("header", "inspect", "check", "share", "base file", "base folder", "resume", "cache", "config", "pictures")


@pytest.fixture
def file(tmp_path, tiny_base):
    return kohya_file(tmp_path / "style.safetensors", tiny_base)


@pytest.fixture
def taken(file):
    return Tensors.read(file.read_bytes())


def changed(file, name, value):
    """The LoRA with one number of a tensor replaced."""
    tensors = load_file(file)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, read_header(file).metadata)


def test_a_part_of_the_run_ends_as_the_whole():
    command = [sys.executable, "-m", "support.fuzzing", "--count", "160", "--seed", "5", "--only", *TARGETS, "shards"]
    run = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines()]
    rows = {target: counts for target, *counts in filter(None, lines)}
    for target in (*TARGETS, "shards"):
        inputs, accepted, refused, others, _, _, events = rows[target]
        assert int(accepted) + int(refused) == int(inputs) and (others, events) == ("0", "0")
        assert int(accepted) and int(refused), target


# LoRA files


def with_entry(**entry):
    """Makes the file whose tensors all have this in their entries."""
    return lambda f: f.with_header({n: f.header[n] | (entry if n in f.names() else {}) for n in f.header})


def with_name(name):
    """Makes the file whose only tensor, an empty one, is called so."""
    return lambda f: f.with_header({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f.with_header(f.header) + bytes(8), "not fully covered"),
        (with_entry(shape=[2**40, 2**40]), "overflow"),
        (with_entry(shape=[1]), "shape"),
        (with_entry(data_offsets=[0, 64]), "offset"),
        (lambda f: f.with_header('{"a": ' + "[" * DEEP + "]" * DEEP + "}"), TOO_DEEP),
        (lambda f: f.with_header({"__metadata__": {"a": 5}}), "expected a string"),
        (with_name("x" * 10_000), "10000 characters"),
        (with_name("\x1b[2J"), "which no tensor has"),
    ],
)
def test_headers_that_only_look_whole(file, taken, change, told):
    file.write_bytes(change(taken))
    with pytest.raises(ValueError, match=f"style.safetensors has a damaged safetensors header .*{told}"):
        read_header(file)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("points", 40.0, "points is 40.0; expected int"),
        ("phases", True, "phases is True; expected int"),
        ("guidance", "8", "guidance is '8'; expected float"),
        ("strength", 1e300, r"strength is 1e\+300; expected a number of less than"),
        ("guidance_max", float("inf"), "guidance_max is inf"),
        ("steps", 41, "steps is 41; at least 1, and at most 40"),
        ("objective", "x" * 2000, "objective has 2000 characters"),
    ],
)
def test_recipes_of_wrong_types_and_sizes(field, value, told):
    text = json.dumps(json.loads(Recipe(family="sd15").to_header()) | {field: value})
    with pytest.raises(ValueError, match=f"The pcm.recipe header cannot be read .*{told}"):
        Recipe.from_header(text)


def test_recipes_nested_deep():
    with pytest.raises(ValueError, match=f"The pcm.recipe header cannot be read .*{TOO_DEEP}"):
        Recipe.from_header("[" * DEEP)


ALPHAS = ('"8"', "NaN", "1e400", "true")


@pytest.mark.parametrize("text", ["[]", "{", "[" * DEEP, *(f'{{"lora_alpha": {alpha}}}' for alpha in ALPHAS)])
def test_metadata_of_peft_that_is_none(tmp_path, tiny_base, text):
    file = kohya_file(tmp_path / "a.safetensors", tiny_base, alpha=None, lora_adapter_metadata=text)
    with pytest.raises(ValueError, match="a.safetensors: its lora_adapter_metadata cannot be read"):
        read_header(file).scale_alphas()


def test_titles_of_any_length_take_no_time():
    start = time.monotonic()
    assert recipe_for_file("a.safetensors", {"modelspec.title": "pcm " * 100_000}, "sd15") is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("down", "up", "dtype"),
    [
        ((4, 8), (6, 3), "F32"),
        ((0, 8), (6, 0), "F32"),
        ((4, 8), (), "F32"),
        ((8,), (6, 4), "F32"),
        ((4, 8), (6, 4), "I32"),
    ],
)
def test_halves_that_make_no_pair_fit_nothing(down, up, dtype):
    dtypes = dict.fromkeys(("down", "up"), dtype)
    assert LoraModule(shapes={"down": (4, 8), "up": (6, 4)}, dtypes=dict.fromkeys(dtypes, "F32")).fits((6, 8))
    assert not LoraModule(shapes={"down": down, "up": up}, dtypes=dtypes).fits((6, 8))


def test_a_weight_under_two_names_is_told(file):
    tensors, name = load_file(file), "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    other = "unet.mid_block.attentions.0.proj_in.lora_B.weight"
    save_file(tensors | {other: tensors[name] + 1}, file, read_header(file).metadata)
    with pytest.raises(ValueError, match=f"style.safetensors has one weight under two names, .*{other}"):
        _ = read_header(file).modules


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_with_numbers_that_are_not_finite_is_named(file, value):
    base, name = load_for_check(TINY), "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    assert describe(file)["not_finite"] == []
    changed(file, name, value)
    told = describe(file)
    assert told["not_finite"] == [name] and f"not finite, such as in {name}" in describe_text(told)
    checked = check_parity(file, base)
    assert not checked["passed"] and f"such as in {name}: every picture is black" in checked["text"]
    with pytest.raises(ValueError, match=f"style.safetensors: numbers in 1 of its tensors .* such as in {name}"):
        install_whole(file, base)


def test_metadata_that_peft_does_not_know_fails(tmp_path, file):
    convert(file, tmp_path / "peft.safetensors", "diffusers")
    whole = Tensors.read((tmp_path / "peft.safetensors").read_bytes())
    told = json.loads(whole.header["__metadata__"]["lora_adapter_metadata"]) | {"unet.nonsense": 1}
    (tmp_path / "peft.safetensors").write_bytes(whole.told("lora_adapter_metadata", json.dumps(told)))
    checked = check_parity(tmp_path / "peft.safetensors", load_for_check(TINY))
    assert (
        not checked["passed"]
        and "diffusers cannot load peft.safetensors into tiny-sd15: `LoraConfig`" in checked["text"]
    )


def test_what_overflows_on_the_way_fails(file):
    changed(file, "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", 1e38)
    assert "the output is not finite: its numbers are too large" in check_parity(file, load_for_check(TINY))["text"]


def test_metadata_moves_no_cursor(tmp_path, tiny_base):
    file = kohya_file(tmp_path / "a.safetensors", tiny_base, **{"modelspec.title": "a\x1b[2J\u202eb"})
    text = describe_text(describe(file))
    assert "a?[2J?b" in text and "\x1b" not in text


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "a\u202eb"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(ValueError, match="expected a file's name"):
        path_within(tmp_path, name)


# Bases


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(bundled_folder(TINY), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_with_weights_that_are_not_finite_is_named(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(n for n in tensors if n.endswith("weight"))[3]
    tensors[name].view(-1)[-1] = float("nan")
    weights.unlink()
    save_file(tensors, weights, {"format": "pt"})
    bare = name.removeprefix("text_model.")
    with pytest.raises(ValueError, match=f"not finite, in 1 of the tensors of its .*, such as .*{bare}"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "betas 'x' to 0.012"),
        ("scheduler/scheduler_config.json", {"beta_schedule": None}, "beta_schedule None"),
        ("unet/config.json", {"cross_attention_dim": [1]}, "Nothing in .* tells which family|cannot be loaded"),
        ("vae/config.json", {"latent_channels": "x"}, "cannot be loaded.* Get its vae again"),
        ("unet/config.json", None, f"cannot be loaded: .*{TOO_DEEP}.* Get the base again"),
        ("tokenizer/tokenizer_config.json", None, f"The tokenizer in .* cannot be loaded: .*{TOO_DEEP}"),
    ],
)
def test_configs_of_a_base_that_are_damaged(folder, name, change, told):
    path = folder / name
    text = "[" * DEEP if change is None else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        load_base(str(folder))
