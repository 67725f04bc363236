"""The study of a LoRA on a fine-tuned base: its style can be merged, and its table says what was measured."""

import torch

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_info import recipe_of
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.generate import probe
from phased_consistency.trainer.lora.merged import merge_into
from phased_consistency.trainer.studies.refine import BASE, style_lora, table


def test_the_style_is_a_plain_lora_that_changes_the_base(tmp_path):
    style_lora(tmp_path / "style.safetensors", side=32, updates=2, pictures=2, batch=2)
    header = read_header(tmp_path / "style.safetensors")
    assert (header.family, recipe_of(header)) == ("sd15", None)

    base = load_base(BASE)
    x, tick = probe(base)
    condition = base.encode_prompts(["a red circle"])
    with torch.no_grad():
        before = base.denoise(x, tick, condition)
        merge_into(base, [str(header.path)])
        assert not torch.equal(base.denoise(x, tick, condition), before)


def test_the_table_has_a_row_for_each_number_of_updates():
    assert table({"refined": {0: 0.5, 15: 0.25}, "scratch": {0: 0.75}}).splitlines() == [
        "| updates | refined | scratch |",
        "|---|---|---|",
        "| 0 | 0.500 | 0.750 |",
        "| 15 | 0.250 |  |",
    ]
