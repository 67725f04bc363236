"""Headers that others can read: whatever writes one keeps it under 1 MiB, or names the entry that is too large."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.samplers.lora_file import header_text, read_header
from phased_consistency.samplers.writing import MOST_HEADER, check_header, copy_with_metadata
from phased_consistency.trainer.lora.write import export
from phased_consistency.trainer.sharing.convert import convert
from phased_consistency.trainer.sharing.extract import extract
from phased_consistency.trainer.sharing.merge import merge
from phased_consistency.trainer.sharing.resize import resize
from phased_consistency.trainer.sharing.tag import tag
from support.runs import TINY, small_config
from support.sharing_files import MODULES, kohya_file

LARGE = {"ss_tag_frequency": json.dumps({"10_cats": {f"tag {i}": i for i in range(70_000)}})}
REFUSED = r"The header of {} would have \d{{7}} bytes, .* at most 1048576 of it. Its largest entry is {}, \d{{7}} bytes"


@pytest.fixture
def large(tiny_base, tmp_path):
    """A LoRA with more tags than anyone reads."""
    return kohya_file(tmp_path / "large.safetensors", tiny_base, rank=8, **LARGE)


@pytest.mark.parametrize(
    "write",
    [
        lambda file, out: convert(file, out, "diffusers"),
        lambda file, out: merge([(file, 1.0), (file, 0.5)], out),
        lambda file, out: resize(file, out, rank=2),
        lambda file, out: tag(file, {"modelspec.author": "me"}, out=out),
    ],
    ids=["convert", "merge", "resize", "tag"],
)
def test_a_large_entry_is_named_and_nothing_written(large, tmp_path, write):
    out, before = tmp_path / "out.safetensors", sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=REFUSED.format(r"\w+\.safetensors", "ss_tag_frequency")):
        write(large, out)
    assert sorted(tmp_path.iterdir()) == before
    tag(large, {}, ["ss_tag_frequency"])
    write(large, out)
    assert len(header_text(out)) < 10_000


def test_what_is_too_large_may_become_smaller(large):
    """Or it could not be mended step by step."""
    tag(large, {"ss_tag_frequency": LARGE["ss_tag_frequency"][:-100]})
    assert len(header_text(large)) > MOST_HEADER


def test_extracting_and_exporting_refuse_too(tiny_base, tmp_path, monkeypatch):
    from phased_consistency.trainer.lora import write as exporting
    from phased_consistency.trainer.sharing import extract as extracting

    out = tmp_path / "out.safetensors"
    monkeypatch.setattr(extracting, "_metadata", lambda *_: LARGE)
    monkeypatch.setattr(extracting, "_weights", lambda *_: ({MODULES[4]: (torch.zeros(4, 4), torch.eye(4))}, 0.0))
    with pytest.raises(ValueError, match=REFUSED.format("out.safetensors", "ss_tag_frequency")):
        extract(TINY, TINY, out, rank=2)
    monkeypatch.setattr(exporting, "package_version", lambda: "1" * MOST_HEADER)
    weights = {f"{MODULES[4]}.lora_{half}": torch.ones(2, 2) for half in "AB"}
    with pytest.raises(ValueError, match=REFUSED.format("out.safetensors", "pcm.version")):
        export(out, weights, small_config(tmp_path / "run"), tiny_base, 1, 1)
    assert not out.exists()


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16, torch.float32), (torch.int8, torch.bfloat16)])
def test_the_size_told_is_that_of_the_file(tmp_path, dtypes):
    """The size is that of files with tensors of several kinds, metadata beyond ASCII, and at the limit, to the byte."""
    tensors = {f"n{i}": torch.ones(i + 1, 3, dtype=dtypes[i % len(dtypes)]) for i in range(40)}
    for metadata in ({"note": 'Nä"\n\t\x01ive'}, {"a": "1", "b": "x" * 100}):
        save_file(tensors, path := tmp_path / "a.safetensors", metadata)
        assert check_header("a", metadata, tensors) == len(header_text(path))


def test_the_limit_is_to_the_byte(tmp_path):
    save_file({"a": torch.ones(2)}, source := tmp_path / "a.safetensors")
    copy_with_metadata(source, tmp_path / "b.safetensors", {"note": ""})
    rest = len(header_text(tmp_path / "b.safetensors").rstrip())
    copy_with_metadata(source, most := tmp_path / "most.safetensors", {"note": "x" * (MOST_HEADER - rest)})
    assert len(header_text(most)) == MOST_HEADER
    with pytest.raises(ValueError, match="The header of a.safetensors would have 1048584 bytes"):
        copy_with_metadata(source, tmp_path / "more.safetensors", {"note": "x" * (MOST_HEADER - rest + 1)})
    assert load_file(most)["a"].tolist() == [1, 1] and set(read_header(most).metadata) == {"note"}
