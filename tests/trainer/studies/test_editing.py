"""The figures of edits on closed forms; every edit's goal on the tiny base, beside baselines.

See docs/measurements/editing.md.
"""

import json
from math import inf, log10, sqrt

import pytest
import torch
from PIL import ImageFilter

from phased_consistency.samplers.operators import Inpaint
from phased_consistency.trainer.families.generate import generate
from phased_consistency.trainer.studies import editing as gallery
from phased_consistency.trainer.studies.edit_baselines import cells_of, filtered, greyed, latent_mask
from phased_consistency.trainer.studies.edit_metrics import (
    as_saved,
    chroma,
    colourfulness,
    evenness,
    low_pass_psnr,
    luminance_error,
    pooled_error,
    psnr,
    seam_ratio,
    sharpness,
)
from phased_consistency.trainer.studies.edit_tables import Chapter, Goal, tables

SIDE = 32


def levels(values):
    """A grey picture (1, 3, H, W) of these levels."""
    return torch.as_tensor(values, dtype=torch.float).expand(1, 3, -1, -1) / 255


def slope():
    """Neighbours differ by 2 levels everywhere, to the right and downwards."""
    return levels(2 * (torch.arange(SIDE)[:, None] + torch.arange(SIDE)))


def block(size=8):
    region = torch.zeros(1, 1, SIDE, SIDE)
    region[..., 12 : 12 + size, 12 : 12 + size] = 1
    return region


def test_psnr_is_of_the_saved_picture():
    picture = slope()
    assert psnr(picture + 0.4 / 255, picture) == inf
    assert psnr(picture + 1 / 255, picture) == pytest.approx(20 * log10(255))


def test_psnr_of_a_part():
    picture, where = slope(), block()
    changed = picture + 5 / 255 * where
    assert psnr(changed, picture, 1 - where) == inf
    assert psnr(changed, picture, where) == pytest.approx(20 * log10(255 / 5))
    assert psnr(changed, picture) == pytest.approx(10 * log10(255**2 / (25 * 64 / SIDE**2)))


def test_low_pass_psnr_sees_the_layout_alone():
    checks = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2
    flat = levels(torch.full((SIDE, SIDE), 100))
    assert low_pass_psnr(levels(95 + 10 * checks), flat, 4) == inf
    assert low_pass_psnr(levels(105 + 10 * checks), flat, 4) == pytest.approx(20 * log10(255 / 10))


def test_pooled_error_is_the_largest_of_a_block():
    low = levels(torch.full((8, 8), 100))
    pictures = low.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert pooled_error(pictures, low) == 0
    pictures[0, 1, 5, 6] += 32 / 255
    assert pooled_error(pictures, low) == pytest.approx(2)


def test_luminance_error_weighs_the_channels():
    pictures = levels(torch.full((4, 4), 100))
    grey = pictures[:, :1].clone()
    assert luminance_error(pictures, grey) == pytest.approx(0, abs=1e-4)
    pictures[:, 0] += 10 / 255
    assert luminance_error(pictures, grey) == pytest.approx(10 * 0.2989 / 0.9999, abs=1e-4)


def test_an_even_slope_has_no_seam():
    assert seam_ratio(slope(), block()) == pytest.approx(1)


def test_a_seam_is_told_by_its_height():
    """Half of 32 pairs across the border rise by 2 + 20 levels, half by 2 - 20: |change| is 20 on average, else 2."""
    assert seam_ratio(slope() + 20 / 255 * block(), block()) == pytest.approx(10)


def test_an_edge_that_is_far_from_the_border_is_no_seam():
    pictures = slope()
    pictures[..., 0] = 1
    assert seam_ratio(pictures, block(), near=4) == pytest.approx(1)
    assert seam_ratio(pictures, block(), near=12) < 0.5


def test_means_are_of_the_batch():
    both = torch.cat([slope(), torch.zeros(1, 3, SIDE, SIDE)])
    assert seam_ratio(both, block().expand(2, -1, -1, -1)) == pytest.approx(1)


def test_colour_figures():
    grey = slope()
    assert chroma(grey) == pytest.approx(0, abs=1e-4) and colourfulness(grey) == 0
    half_red = torch.zeros(1, 3, 8, 8)
    half_red[:, 0, :4] = 1
    assert colourfulness(half_red) == pytest.approx(1.3 * 127.5 * sqrt(1.25), rel=1e-5)
    luma = 255 * 0.2989 / 0.9999
    spread = [255 - luma, -luma, 0, 0]  # half the pixels are black
    assert chroma(half_red) == pytest.approx(torch.tensor(spread).std(correction=0).item(), rel=1e-5)


def test_sharpness_of_a_slope_and_of_a_checkerboard():
    checks = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2
    assert sharpness(slope()) == pytest.approx(0, abs=1e-4)
    assert sharpness(levels(100 + 10 * checks)) == pytest.approx(16 * 100, rel=1e-4)


def test_evenness():
    ramp = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    jump = torch.tensor([0.0, 0, 1, 1, 1]).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    assert evenness(ramp) == pytest.approx(1) and evenness(jump) == pytest.approx(4)


def test_filters_work_in_8_bits():
    speck = levels(torch.full((8, 8), 100))
    speck[..., 4, 4] = 1
    assert torch.equal(filtered(speck, ImageFilter.MedianFilter(3)), levels(torch.full((8, 8), 100)))


def test_latents_masked_everywhere_are_generated_and_nowhere_are_kept(tiny_base):
    condition = tiny_base.encode_prompts(["a red star on a blue background"])
    null = tiny_base.null_condition(tiny_base.encode_prompts([""]))
    known, ticks = torch.randn(1, 4, 8, 8), (1000, 500, 0)
    cells = torch.ones(1, 1, 8, 8)
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(3))
    alone = generate(tiny_base, condition, null, noise, ticks, guidance=2.0, start=known)
    pictures = latent_mask(tiny_base, condition, null, known, cells, ticks, guidance=2.0, seed=3)
    torch.testing.assert_close(pictures, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(latent_mask(tiny_base, condition, null, known, 0 * cells, ticks, seed=3), known)


def test_the_host_s_masks():
    mask = block()
    grey, grown = greyed(torch.zeros(1, 3, SIDE, SIDE), mask)
    assert torch.equal(grey, 0.5 * mask.expand(-1, 3, -1, -1))
    assert mask.sum() == 64 and grown.sum() == 13**2 and (grown >= mask).all()
    assert cells_of(mask, torch.zeros(2, 4, 4, 4))[1, 0].tolist() == [[0] * 4, *[[0, 0.25, 0.25, 0]] * 2, [0] * 4]


def test_goals_and_tables():
    chapter = Chapter("Edit", ["a"], lambda pictures: {"sum": pictures.sum().item(), "error": inf})
    chapter.add("a row", torch.ones(1, 3, 2, 2))
    chapter.goals = [Goal("is met", 0.5, 0, 1), Goal("is not", 2.0, most=1)]
    text = tables([chapter])
    assert "| Edit | is met | 0.50 | at least 0, at most 1 | yes |" in text
    assert "| Edit | is not | 2 | at most 1 | no |" in text
    assert "| a row | 12 | exact |" in text
    assert json.loads(json.dumps(chapter.as_dict(), allow_nan=False))["rows"]["a row"] == {"sum": 12, "error": None}


@pytest.fixture(scope="module")
def drawn():
    """The base alone at 4 steps without guidance, on few pictures."""
    return gallery.Gallery("tiny-sd15", None, 3, steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def chapters(drawn):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(gallery, "VARIANTS", {"ours": {}})
        patch.setattr(gallery, "STRENGTHS", (0.5, 1.0))
        patch.setattr(gallery, "PAIRS", 1)
        names = ("inpaint", "outpaint", "colorize", "upscale8", "denoise", "interpolate")
        return {name: gallery.EDITS[name](drawn) for name in names}


def row(chapters, edit, label="ours"):
    return chapters[edit].rows[label]


@pytest.mark.parametrize("edit", ["inpaint", "outpaint"])
def test_what_is_known_stays(chapters, edit):
    ours, host = row(chapters, edit), row(chapters, edit, "SetLatentNoiseMask")
    assert ours["PSNR of what is known"] >= 50 > 40 > host["PSNR of what is known"]


def test_no_seam_shows(chapters):
    """On more pictures, since chance decides how many edges lie on the border of few (its truth's: 1.1)."""
    drawn = gallery.Gallery("tiny-sd15", None, 6, steps=4, guidance=1.0)
    mask = gallery.holes(6)
    assert 0.8 <= seam_ratio(drawn.edit(drawn.ours, Inpaint(drawn.truth, mask)).image, mask) <= 1.3
    ours, perfect = row(chapters, "inpaint"), row(chapters, "inpaint", "truth through the VAE")
    assert 0.8 <= ours["seam where drawing ends"] / perfect["seam where drawing ends"] <= 1.3
    pasted = row(chapters, "inpaint", "the same, pasted")["seam at the mask"]
    assert pasted / perfect["seam at the mask"] > 1.3


def test_the_luminance_stays(chapters):
    ours, other = row(chapters, "colorize"), row(chapters, "colorize", "img2img, strength 1")
    assert ours["luminance error"] <= 0.5 < other["luminance error"]
    assert ours["chroma"] > 0.5 * row(chapters, "colorize", "truth")["chroma"]


def test_super_resolution_keeps_the_small_picture_and_beats_the_baselines(chapters):
    ours, bicubic = row(chapters, "upscale8"), row(chapters, "upscale8", "bicubic")
    others = [figures for label, figures in chapters["upscale8"].rows.items() if "img2img" in label]
    assert others and ours["pooled error"] <= 1 < min(f["pooled error"] for f in [bicubic, *others])
    assert ours["PSNR"] > max(f["PSNR"] for f in [bicubic, *others])
    assert ours["sharpness"] > bicubic["sharpness"]


def test_noise_is_taken_out(chapters):
    for column in ("PSNR, noise 25", "PSNR, noise 50"):
        assert row(chapters, "denoise")[column] > row(chapters, "denoise", "noisy")[column] + 5


def test_interpolation_ends_in_the_single_pictures(chapters):
    (goal,) = chapters["interpolate"].goals
    assert goal.value == 0 and goal.met


def test_the_script_writes_its_files(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "Gallery", lambda *_: drawn)
    monkeypatch.setattr(gallery, "NOISES", (25,))
    assert gallery.main(["--edits", "denoise", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(goal["met"] for goal in report["edits"]["denoise"]["goals"])
    assert "**Denoise**" in (tmp_path / "tables.md").read_text() and (tmp_path / "denoise.jpg").stat().st_size > 1000


def test_an_unknown_edit_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gallery.main(["--edits", "inpaint,blur", "--out", str(tmp_path)])
    assert "no such edits: blur; available: inpaint, outpaint" in capsys.readouterr().err


def test_saved_pictures_are_in_range():
    assert torch.equal(as_saved(torch.tensor([-1.0, 0.5, 2.0])), torch.tensor([0.0, 128 / 255, 1.0]))
