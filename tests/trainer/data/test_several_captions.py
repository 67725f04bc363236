"""Several captions of a picture: which are taken, and that a draw belongs to the visit alone."""

import json
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
from webdataset import TarWriter

from phased_consistency.trainer.config.config import MAY_CHANGE
from phased_consistency.trainer.data import cache
from phased_consistency.trainer.data.prompts import read_prompts
from phased_consistency.trainer.data.store import Captions
from phased_consistency.trainer.objectives import PCM
from phased_consistency.trainer.training.batches import Batches, Split
from phased_consistency.trainer.training.checkpoint import agreed_changes
from support.data_stubs import StubBase, drawn
from support.runs import small_config

ALL = {"a.png": ["one", "three", "seven"], "b.png": ["two"], "c.png": ["nine nine", "one"]}


@pytest.fixture(params=["lines", "list", "shards"])
def source(request, tmp_path):
    """The setting that names these pictures, with their captions as lines, as lists, or in a shard."""
    folder = tmp_path / "data"
    folder.mkdir()
    if request.param == "shards":
        with TarWriter(str(folder / "set.tar")) as tar:
            for name, texts in ALL.items():
                text = (
                    {"txt": "\n".join(texts)} if name == "a.png" else {"json": json.dumps({"caption": texts}).encode()}
                )
                tar.write({"__key__": name[0], "png": drawn(16, 16), **text})
        return {"data__shards": folder / "set.tar"}
    for name, texts in ALL.items():
        (folder / name).write_bytes(drawn(16, 16))
        if request.param == "lines":
            (folder / name).with_suffix(".txt").write_bytes("\r\n\r\n".join(texts).encode())
    if request.param == "list":
        lines = [json.dumps({"file_name": name, "text": texts}) for name, texts in ALL.items()]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"data__images": folder}


@pytest.fixture
def build(tmp_path, source):
    def build(choice=None):
        more = {"data__captions": choice} if choice else {}
        return cache.build_cache(small_config(tmp_path / "run", **source, **more), StubBase(), lambda *_: None)

    return build


def test_the_first_is_taken_and_that_is_said(build):
    data = build()
    assert list(data.captions) == ["one", "two", "nine nine"] and list(data.prompts)[1:] == list(data.captions)
    (note,) = data.notes
    assert note.startswith("2 of the 3 samples have several captions (lines, or a list): the first is taken; ")
    assert all(data.captions.drawn(i, seed) == data.captions[i] for i in range(3) for seed in range(5))


def test_all_are_taken_as_one(build):
    data = build("joined")
    assert list(data.captions) == ["one three seven", "two", "nine nine one"]
    assert data.notes == ["2 of the 3 samples have several captions (lines, or a list): all are taken as one"]


def test_one_is_drawn_by_the_seed_alone(build):
    data = build("drawn")
    for number, texts in enumerate(ALL.values()):
        counts = Counter(data.captions.drawn(number, seed) for seed in range(600))
        assert counts.keys() == {*texts} and max(counts.values()) - min(counts.values()) <= 1
        assert data.captions[number] == texts[0]
    assert data.notes == ["2 of the 3 samples have several captions (lines, or a list): one is drawn at each visit"]
    assert data.encoding(["seven"])["hidden"].item() == 5


def test_another_choice_is_another_cache(build):
    assert len({build(choice).folder for choice in ("first", "drawn", "joined")}) == 3


def test_visits_draw_and_resumed_ones_draw_the_same(build, tiny_base):
    data = build("drawn")
    empty = data.encoding([""])

    def stream(first):
        batches = Batches(data, tiny_base, PCM(), empty, split=Split(3), updates=40, seed=5)
        return [
            dict(zip(samples, batch.condition["hidden"].flatten().tolist(), strict=True))
            for samples, batch in (batches.at(number) for number in range(first, 40))
        ]

    visits = stream(0)
    lengths = {number: {visit[number] for visit in visits} for number in range(3)}
    assert lengths == {number: {len(text) for text in texts} for number, texts in enumerate(ALL.values())}
    assert stream(17) == visits[17:]


def captions_of(groups, prompts=9):
    """Captions that share prompts as these lists of each sample's say."""
    several = {number: some for number, some in enumerate(groups) if len(some) > 1}
    columns = np.array([*several]), np.cumsum([0, *map(len, several.values())]), np.array(sum(several.values(), []))
    return Captions(range(prompts), np.array([some[0] for some in groups]), columns)


def test_samples_that_share_a_caption_are_one_group():
    groups = captions_of([[1, 2], [3], [2, 4], [5], [4, 3], [6, 7]]).groups
    assert len({*groups[[0, 1, 2, 4]]}) == 1 and len({*groups}) == 3


@pytest.mark.parametrize(
    "columns", [([3], [0, 2], [0, 1]), ([0], [0, 1], [0, 1]), ([0], [0, 2], [0, 9]), ([0], [0, 0], [])]
)
def test_columns_that_do_not_fit_are_damage(columns):
    with pytest.raises(ValueError, match="whole numbers are|numbers below|do not follow"):
        Captions(range(3), np.array([0, 1, 2]), [np.array(column, np.int64) for column in columns])


def test_places_of_data_may_change_between_starts():
    assert {"data.images", "data.shards", "data.prompts"} <= {*MAY_CHANGE} and "data.captions" not in MAY_CHANGE


def test_a_prompt_ends_at_a_line_feed_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a\x0bb\r\nc\u2028d\x85e\x1cf\n\n# no\ng\x0ch".encode())
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a\x0bb", "c\u2028d\x85e\x1cf", "g\x0ch"]


@pytest.mark.parametrize(("images", "refused"), [(None, False), ("pictures", True)])
def test_a_run_from_before_there_was_a_choice_goes_on_unless_it_has_captions(images, refused, tmp_path):
    config = small_config(tmp_path / "run", data__images=images and str(tmp_path / images))
    settings = config.what_decides_the_weights()
    earlier = settings | {"data": {key: value for key, value in settings["data"].items() if key != "captions"}}
    before = 3, {"settings": earlier, "changes": []}
    expected = pytest.raises(ValueError, match="data.captions: None then, first now") if refused else nullcontext()
    with expected:
        assert agreed_changes(tmp_path, before, settings, config.may_change) == []
