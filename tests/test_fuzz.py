"""Files that others made: a part of the fuzz run (`python tests/fuzzing.py`), and each defect that it found."""

import gzip
import json
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file

from fuzz.pictures import tar_field, tar_of
from fuzz.tensors import DEEP, Tensors
from phased_consistency.samplers.known_files import recipe_for_file
from phased_consistency.samplers.lora_file import LoraModule, read_header
from phased_consistency.samplers.recipe import Recipe
from phased_consistency.samplers.writing import path_within
from phased_consistency.trainer.checkpoint import write_tensors
from phased_consistency.trainer.config import load_config
from phased_consistency.trainer.data import shards
from phased_consistency.trainer.data.cache import write_latents
from phased_consistency.trainer.data.folders import find_pictures, load_picture
from phased_consistency.trainer.data.index import latents_name, write_index
from phased_consistency.trainer.data.reading import content_hash, file_hashes
from phased_consistency.trainer.data.shards import read_shard
from phased_consistency.trainer.data.store import INDEX, TEXTS, LatentCache, prompts_name
from phased_consistency.trainer.families import bundled_folder, load_base
from phased_consistency.trainer.inspection import check_parity, describe, describe_text, install_whole, load_for_check
from runs import TINY
from sharing_files import kohya_file

FUZZING = Path(__file__).with_name("fuzzing.py")
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
    command = [sys.executable, FUZZING, "--count", "160", "--seed", "5", "--only", *TARGETS, "shards"]
    run = subprocess.run(command, capture_output=True, text=True)
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
        (lambda f: f.with_header('{"a": ' + "[" * DEEP + "]" * DEEP + "}"), "recursion"),
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
    with pytest.raises(ValueError, match="The pcm.recipe header cannot be read .*recursion"):
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
        ("unet/config.json", None, "cannot be loaded: .*recursion.* Get the base again"),
        ("tokenizer/tokenizer_config.json", None, "The tokenizer in .* cannot be loaded: .*recursion"),
    ],
)
def test_configs_of_a_base_that_are_damaged(folder, name, change, told):
    path = folder / name
    text = "[" * DEEP if change is None else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        load_base(str(folder))


# Pictures and captions


def test_a_picture_that_only_a_program_can_draw_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(ValueError, match="cannot be read"):
        load_picture(tmp_path / "a.png", 8)


def test_a_grey_picture_of_16_bits_keeps_its_greys(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    pixels, _ = load_picture(tmp_path / "a.png", 64)
    assert torch.equal(pixels, torch.from_numpy(grey >> 8).float().div(127.5).sub(1).expand(3, -1, -1))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_line_of_pixels_is_enlarged_where_it_is_seen_alone(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    pixels, sizes = load_picture(tmp_path / "a.png", 512)
    assert pixels.shape == (3, 512, 512) and torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1, -1]))
    assert max(sizes.tolist()) == (512 * 60_000 - 512) // 2


@pytest.mark.parametrize("content", ["a star".encode("utf-16-le"), b"\xff\xfea", b"\0"])
def test_captions_in_other_encodings(tmp_path, content):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match="a.png: not UTF-8: a.txt"):
        find_pictures(str(tmp_path), skip_bad=False)


LINES = ('{"file_name": "a.png", "text": "\\ud800"}', "[" * DEEP, '{"file_name": "a\\u0000.png", "text": ""}')


@pytest.mark.parametrize("line", LINES)
def test_lines_of_metadata_that_are_no_captions(tmp_path, line):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match="metadata.jsonl line 1: not "):
        find_pictures(str(tmp_path), skip_bad=False)


def drawn() -> bytes:
    content = BytesIO()
    Image.new("RGB", (9, 9)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b'{"caption": "\\ud800"}', "not UTF-8: its caption"),
        ("a.json", b"[" * DEEP, "not UTF-8 or not JSON"),
        ("a.txt", b"a\0", "not UTF-8: its caption"),
    ],
)
def test_captions_in_archives(tmp_path, name, content, told):
    (tmp_path / "set.tar").write_bytes(tar_of([("a.png", drawn()), (name, content)]))
    assert told in next(read_shard(str(tmp_path / "set.tar"))).problem


def test_an_archive_that_claims_no_end_is_given_up(tmp_path):
    data = tar_of([("a.png", drawn()), ("a.txt", b"a")])
    (tmp_path / "set.tar").write_bytes(tar_field(data, 124, b"\x80" + b"\xff" * 11))
    start = time.monotonic()
    assert any("unexpected end of data" in sample.problem for sample in read_shard(str(tmp_path / "set.tar")))
    assert time.monotonic() - start < 10


def test_a_file_too_large_for_a_picture_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST", 1000)
    entries = [("a.png", bytes(5000)), ("a.txt", b"a"), ("b.png", drawn()), ("b.txt", b"b")]
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar_of(entries)))
    found = list(read_shard(str(tmp_path / "set.tar.gz")))
    assert [sample.caption for sample in found if not sample.problem] == ["b"]
    assert any("a.png has 5000 bytes: at most 1000 are read" in sample.problem for sample in found)


@pytest.mark.parametrize("known", ["[]", "5", '{"x": 5}', "[" * DEEP, '{"x": [1, 2]}'])
def test_remembered_hashes_of_another_form_are_taken_again(tmp_path, known):
    (tmp_path / "known.json").write_text(known)
    (tmp_path / "a").write_bytes(b"a")
    assert file_hashes([tmp_path / "a"], tmp_path / "known.json", 0) == [content_hash(tmp_path / "a")]


# Caches


@pytest.fixture
def cache(tmp_path):
    """A cache's folder, of two files with three samples each."""
    for piece in range(2):
        tensors = {"mean.2x2": torch.randn(3, 3, 2, 2), "sizes": torch.full((3, 6), 16)}
        tensors["shape"] = torch.zeros(3, dtype=torch.int16)
        write_latents(tmp_path / latents_name(0, piece, piece == 1), tensors, ["2x2"], ["a", "b", "c"], [])
    write_index(tmp_path, None, False)
    write_tensors(tmp_path / prompts_name(0), {"hidden": torch.randn(4, 2, 3).half()}, {})
    return tmp_path


def read_cache(folder):
    found = LatentCache(folder)
    return found.latents(range(6), [None] * 6), found.sizes(range(6)), found.encoding(found.captions)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (INDEX, {"shape": torch.full((6,), 1, dtype=torch.int16)}),
        (INDEX, {"prompt": torch.full((6,), -1, dtype=torch.int32)}),
        (INDEX, {"row": torch.zeros(5, dtype=torch.int16)}),
        (INDEX, {"first": torch.tensor([0, 99])}),
        (INDEX, {"row": torch.zeros(6)}),
        (INDEX, {"files": '["../a.safetensors", "b"]'}),
        (INDEX, {"skipped": "[" * DEEP}),
        (INDEX, {"shapes": None}),
        (TEXTS, {"number": torch.full((4,), 4, dtype=torch.int32)}),
        (TEXTS, {"text": torch.full((3,), 255, dtype=torch.uint8)}),
        (latents_name(0, 1, True), {"mean.2x2": torch.randn(3, 3, 2, 3)}),
        (latents_name(0, 0, False), {"mean.2x2": torch.randn(1, 3, 2, 2)}),
        (latents_name(0, 0, False), {"sizes": None}),
        (prompts_name(0), {"hidden": torch.randn(2, 2, 3)}),
    ],
)
def test_files_of_a_cache_with_other_contents_are_named(cache, name, change):
    read_cache(cache)
    tensors, told = load_file(cache / name), read_header(cache / name).metadata
    tensors |= {key: value for key, value in change.items() if key in tensors}
    told |= {key: value for key, value in change.items() if key in told}
    tensors, told = ({k: v for k, v in table.items() if v is not None} for table in (tensors, told))
    save_file(tensors, cache / name, told)
    with pytest.raises(ValueError, match=f"{name} is damaged .*Delete it: the same command makes it again"):
        read_cache(cache)


# Configurations


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"a = {'9' * 5000}", "run.toml is not valid TOML: Exceeds the limit"),
        (f"a = {'[' * DEEP}", "run.toml is not valid TOML: .*recursion"),
        (f"a = {'[' * 20}{']' * 20}", "run.toml nests more than 6 levels"),
        (f"{'.'.join('a' * 500)} = 1", "run.toml nests more than 6 levels"),
        ("\n".join(f"k{i} = 1" for i in range(3000)), r"has 3001 problems:\n(.*\n){50}  and 2951 more.$"),
        (f'[base]\npath = "x"\nfamily = "{"x" * 10_000}"', r"base.family = 'x{199}\.\.\.: "),
    ],
)
def test_configurations_of_any_size_are_refused_in_few_lines(tmp_path, text, told):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        load_config(str(tmp_path / "run.toml"))
    assert len(str(error.value)) < 10_000


@pytest.mark.parametrize("override", [f"train.steps={'9' * 5000}", f"{'a.' * 3000}a=1", f"train.steps={'[' * 3000}"])
def test_overrides_of_any_size_are_refused_in_few_lines(override):
    with pytest.raises(ValueError, match="The override .* nests more than|The configuration has") as error:
        load_config(overrides=["base.path=x", override])
    assert len(str(error.value)) < 10_000
