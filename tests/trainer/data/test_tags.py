"""Captions of tags in variants, and wildcards in prompt files: the same on every machine, and nothing passed over."""

from collections import Counter

import pytest

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.data import cache
from phased_consistency.trainer.data.captions import chosen
from phased_consistency.trainer.data.prompts import prompts_in, prompts_of
from phased_consistency.trainer.data.tags import Tags
from phased_consistency.trainer.data.wildcards import expanded
from support.data_stubs import StubBase, drawn
from support.runs import small_config

CAPTION = "1girl, red hair, smile, outdoors, sky"


def tags_of(caption):
    return caption.split(", ")


def test_variants_shuffle_all_but_the_kept_tags():
    variants = Tags(8, keep=2, drop=0.0).varied(CAPTION)
    assert 1 < len(variants) <= 6  # three tags have six orders
    for variant in variants:
        assert tags_of(variant)[:2] == ["1girl", "red hair"]
        assert Counter(tags_of(variant)) == Counter(tags_of(CAPTION))


def test_variants_drop_their_share_of_the_others():
    caption = ", ".join(f"tag{n}" for n in range(41))
    lengths = [len(tags_of(variant)) - 1 for variant in Tags(50, keep=1, drop=0.25).varied(caption)]
    assert sum(lengths) / len(lengths) == pytest.approx(30, abs=2) and len(set(lengths)) > 3
    assert all(variant.startswith("tag0, ") for variant in Tags(50, 1, 0.25).varied(caption))


def test_a_variant_belongs_to_the_caption_and_its_number_alone():
    few, many = Tags(3, 1, 0.2).varied(CAPTION), Tags(9, 1, 0.2).varied(CAPTION)
    assert many[: len(few)] == few
    # The same on every machine: written down once.
    assert Tags(2, 1, 0.0).varied("a, b, c, d, e") == WRITTEN


WRITTEN = ["a, b, c, e, d", "a, c, d, b, e"]


@pytest.mark.parametrize("caption", ["a photo of a cat", "one tag,", "kept, moved"])
def test_a_caption_without_tags_to_move_stays_as_it_is(caption):
    assert Tags(4, 1, 0.0).varied(caption) == [caption]


def test_a_variant_is_never_empty():
    assert all(Tags(64, 0, 0.9).varied("a, b"))


def test_every_line_of_several_captions_has_its_variants():
    tags = Tags(3, 1, 0.0)
    assert chosen("a, b, c, d\nno tags", "drawn", tags) == [*tags.varied("a, b, c, d"), "no tags"]
    assert chosen("a, b, c, d\nno tags", "first", tags) == tags.varied("a, b, c, d")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, caption in {"a": CAPTION, "b": "a photo"}.items():
        (folder / f"{name}.png").write_bytes(drawn(16, 16))
        (folder / f"{name}.txt").write_text(caption)
    return folder


def built(tmp_path, pictures, **changes):
    config = small_config(tmp_path / "run", data__images=pictures, **changes)
    return cache.build_cache(config, StubBase(), lambda *_: None)


def test_each_variant_is_encoded_once_and_one_is_drawn_at_each_visit(tmp_path, pictures):
    data = built(tmp_path, pictures, data__tag_variants=4)
    variants = Tags(4, 1, 0.0).varied(CAPTION)
    assert list(data.prompts) == ["", *variants, "a photo"]
    assert f"1 of the 2 samples have captions of tags, in up to {len(variants)} variants each" in data.notes
    again = built(tmp_path, pictures, data__tag_variants=4, data__keep_tags=2)
    assert again.folder != data.folder


# --- wildcards


def test_a_choice_and_a_file_are_replaced_by_the_prompt_s_place(tmp_path):
    (tmp_path / "colour.txt").write_text("# colours\nred\nblue\n\ngreen\n")
    prompts = expanded(["a __colour__ {cat|dog}", "plain"], 200, tmp_path)
    assert prompts[1::2] == ["plain"] * 100
    counts = Counter(prompts[::2])
    assert set(counts) == {f"a {c} {a}" for c in ("red", "blue", "green") for a in ("cat", "dog")}
    assert min(counts.values()) > 5
    assert expanded(["a __colour__ {cat|dog}", "plain"], 60, tmp_path) == prompts[:60]


def test_wildcards_may_hold_others(tmp_path):
    (tmp_path / "animal.txt").write_text("{big|small} cat\n")
    assert set(expanded(["a __animal__{, in {snow|rain}|}"], 60, tmp_path)) == {
        f"a {size} cat{where}" for size in ("big", "small") for where in ("", ", in snow", ", in rain")
    }


def test_a_run_has_as_many_prompts_as_latents_where_they_have_wildcards(tmp_path):
    (tmp_path / "p.txt").write_text("a {red|blue} circle\na star\n")
    config = small_config("nowhere", data__prompts=tmp_path / "p.txt", data__count=7)
    assert len(prompts_of(config)) == 7 and prompts_of(config)[1] == "a star"
    plain = tmp_path / "plain.txt"
    plain.write_text("a {circle}\na_b__c\n")
    assert prompts_in(str(plain), 7) == ["a {circle}", "a_b__c"]


# --- bad input


def test_captions_without_tags_are_refused_where_variants_are_wanted(tmp_path, pictures):
    (pictures / "a.txt").write_text("a photo of a cat")
    with pytest.raises(ValueError, match="data.tag_variants is 4, and none of the 2 captions has more than data.keep_"):
        built(tmp_path, pictures, data__tag_variants=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.drop_tags": 0.1, "data.images": "x"}, "data.drop_tags is for captions of tags"),
        ({"data.tag_variants": 4}, "data.tag_variants is for captions of pictures; prompts have wildcards"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        load_config(None, settings, "demo-sd15")


def test_a_wildcard_without_a_file_is_named_with_those_that_there_are(tmp_path):
    (tmp_path / "colour.txt").write_text("red")
    with pytest.raises(
        ValueError, match=r"the wildcard __color__, and there is no .*color.txt. Files beside it: colour"
    ):
        expanded(["a __color__ cat"], 1, tmp_path)


def test_wildcards_that_lead_to_each_other_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("__b__")
    (tmp_path / "b.txt").write_text("__a__")
    with pytest.raises(ValueError, match="lead to each other without an end"):
        expanded(["__a__"], 1, tmp_path)


def test_an_empty_wildcard_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no lines"):
        expanded(["__a__"], 1, tmp_path)
