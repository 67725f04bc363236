"""`pcm edit`: files in, files out; what an edit keeps is in the written picture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from phased_consistency.samplers import Recipe
from phased_consistency.samplers.operators import Colorize, Inpaint, luminance
from phased_consistency.trainer.families.generate import generate
from phased_consistency.trainer.inference.edit import Editor, kept_error
from phased_consistency.trainer.lora.install import null_of
from phased_consistency.trainer.pictures import write_pictures
from phased_consistency.trainer.tiny.bundled import bundled_folder
from phased_consistency.trainer.tiny.scenes import draw
from support.edit_files import SCENES, box, save
from support.runs import TINY, sha256

pytestmark = pytest.mark.usefixtures("loaded_once")
EDITS = ("inpaint", "outpaint", "colorize", "upscale", "stroke", "denoise", "interpolate")
FAST = ("--steps", "2", "--guidance", "1")


@pytest.fixture
def edit(pcm, tmp_path):
    """Run an edit on the tiny base; returns what it printed as JSON, and the picture that it wrote."""

    def run(kind, *args, base=TINY, out="out.png"):
        result = pcm("edit", kind, "--base", base, "--out", tmp_path / out, "--json", *args)
        assert result.code == 0, result
        details = json.loads(result.out)
        assert all(warning in result.err for warning in details["warnings"])
        return details, pixels(tmp_path / out) if (tmp_path / out).is_file() else None

    return run


def pixels(path) -> Tensor:
    """The levels of a file (C, H, W), as whole numbers in float."""
    values = torch.from_numpy(np.array(Image.open(path))).float()
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def off_luminance(a: Tensor, b: Tensor) -> Tensor:
    return (luminance(a[None]) - luminance(b[None])).abs()


@pytest.mark.parametrize("kind", EDITS)
def test_every_edit_has_help(pcm, kind):
    assert kind in pcm("edit", "--help").out
    result = pcm("edit", kind, "--help")
    assert result.code == 0 and f"pcm edit {kind} --base" in result.out and result.err == ""
    for option, have in {
        "--lora": EDITS,
        "--json": EDITS,
        "--image": EDITS[:6],
        "--projection": EDITS[:4],
        "--grow": EDITS[:2],
        "--denoise": EDITS[:5],
        "--to-seed": EDITS[6:],
    }.items():
        assert (f"{option} " in result.out) == (kind in have), option


def test_inpainting_keeps_every_pixel_outside(edit, photo, mask, lora):
    details, out = edit("inpaint", "--image", photo, "--mask", mask, "--lora", lora, "--prompt", "a red star")
    assert (details["steps"], details["ticks"]) == (4, [1000, 750, 500, 250, 0])
    assert (details["guidance"], details["gamma"], details["seed"]) == (1, 0, 0)
    assert details["size"] == details["canvas"] == [64, 64]
    assert details["kept_error"] == {"max": 0, "mean": 0} and details["warnings"] == []
    before, outside = pixels(photo), torch.ones(64, 64, dtype=torch.bool)
    outside[8:56, 8:56] = False
    assert out[:, outside].equal(before[:, outside])
    assert (out - before)[:, 16:48, 16:48].abs().mean() > 5


def test_the_latent_projection_and_none_keep_the_picture_too(edit, photo, mask):
    results = {}
    for projection in ("picture", "latent", "none"):
        how = ("--mask", mask, "--projection", projection, *FAST)
        details, results[projection] = edit("inpaint", "--image", photo, *how)
        assert details["kept_error"]["max"] == 0
    inner = [out[:, 16:48, 16:48] for out in results.values()]
    assert not inner[0].equal(inner[1]) and not inner[1].equal(inner[2])


def test_every_and_form_are_the_loop_s(edit, photo):
    how = ("--image", photo, "--steps", "3", "--guidance", "1")
    _, usual = edit("colorize", *how)
    assert edit("colorize", *how, "--every", "1", "--form", "residual")[1].equal(usual)
    assert not edit("colorize", *how, "--every", "2")[1].equal(usual)
    assert not edit("colorize", *how, "--form", "plain")[1].equal(usual)


def test_without_a_mask_the_transparent_parts_are_drawn(edit, tmp_path):
    picture = draw(SCENES[0], 64)
    picture.putalpha(Image.eval(box((64, 64), (40, 0, 64, 64)), lambda v: 255 - v))
    source = save(tmp_path / "erased.png", picture)
    _, out = edit("inpaint", "--image", source, "--grow", "0", *FAST)
    before = pixels(source)
    assert len(out) == 3 and out[..., :40].equal(before[:3, :, :40])
    assert not out[..., 40:].equal(before[:3, :, 40:])


def test_an_empty_mask_gives_the_picture_and_says_so(edit, photo, tmp_path):
    black = save(tmp_path / "black.png", Image.new("L", (64, 64)))
    details, out = edit("inpaint", "--image", photo, "--mask", black, *FAST)
    assert "The mask is empty: nothing is drawn, and the result is the picture itself." in details["warnings"]
    assert out.equal(pixels(photo))


def test_a_full_mask_keeps_nothing_and_says_so(edit, photo, tmp_path):
    white = save(tmp_path / "white.png", Image.new("L", (64, 64), 255))
    details, _ = edit("inpaint", "--image", photo, "--mask", white, *FAST)
    assert "The mask covers all of the picture: nothing of it is kept." in details["warnings"]


def test_outpainting_keeps_the_picture_in_place(edit, photo):
    sides = ("--left", "16", "--bottom", "7")
    details, out = edit("outpaint", "--image", photo, *sides, "--grow", "0", *FAST)
    assert details["size"] == [80, 71] and details["canvas"] == [80, 72]
    assert out.shape == (3, 71, 80) and out[:, :64, 16:].equal(pixels(photo))
    _, out = edit("outpaint", "--image", photo, *sides, "--grow", "24", *FAST)
    assert out[:, :40, 40:].equal(pixels(photo)[:, :40, 24:])


def test_colorizing_keeps_the_luminance(edit, tmp_path):
    grey = save(tmp_path / "grey.png", draw(SCENES[1], 64).convert("L"))
    details, out = edit("colorize", "--image", grey, "--prompt", SCENES[1].caption, "--steps", "4")
    assert len(out) == 3 and out.std(0).mean() > 3  # colours there are
    assert off_luminance(out, pixels(grey).expand(3, -1, -1)).mean() <= 0.5
    assert details["kept_error"]["mean"] <= details["kept_error"]["max"] <= 0.501


@pytest.mark.parametrize("factor", [2, 3])
def test_upscaling_keeps_the_means(edit, tmp_path, factor):
    small = save(tmp_path / "small.png", draw(SCENES[2], 24))
    details, out = edit("upscale", "--image", small, "--factor", str(factor), "--guidance", "1")
    assert details["size"] == [24 * factor] * 2 and details["ticks"] == [750, 625, 500, 375, 250, 125, 0]
    means = torch.nn.functional.avg_pool2d(out, factor)
    assert (means - pixels(small)).abs().max() <= 1
    assert out.view(3, 24, factor, 24, factor).std((2, 4)).mean() > 0.5  # there is detail


def test_upscaling_by_one_is_the_picture(edit, photo):
    details, out = edit("upscale", "--image", photo, "--factor", "1", *FAST)
    assert out.equal(pixels(photo)) and "--factor 1 keeps every pixel" in details["warnings"][0]


def test_strokes_start_at_their_level(edit, photo, lora):
    alone, _ = edit("stroke", "--image", photo, "--guidance", "1", "--denoise", "0.75")
    assert alone["ticks"] == [750, 625, 500, 375, 250, 125, 0] and alone["kept_error"] is None
    edges, _ = edit("stroke", "--image", photo, "--lora", lora, "--denoise", "0.5")
    assert edges["ticks"] == [500, 250, 0]
    asked, _ = edit("stroke", "--image", photo, *FAST, "--denoise", "0.5")
    assert asked["ticks"] == [500, 0]


def test_strokes_with_a_one_phase_lora_take_two_levels(tiny_base):
    """The second has 0.416 of the first one's noise, on SD1.5's schedule."""
    recipe = Recipe(family="sd15", mode="stochastic", phases=1, points=50)
    editor = Editor(tiny_base, recipe, {}, guidance=1.0)
    drawn = editor.stroke(torch.rand(1, 3, 64, 64), tiny_base.encode_prompts(["a red star"]), strength=0.76)
    assert drawn.plan.ticks == (760, 520, 0)


def test_a_weaker_stroke_stays_nearer(edit, photo):
    before = pixels(photo)
    near, far = (
        (edit("stroke", "--image", photo, "--guidance", "1", "--denoise", share)[1] - before).abs().mean()
        for share in ("0.2", "0.9")
    )
    assert near < 0.6 * far


def test_denoising_beats_the_noisy_picture(edit, tmp_path):
    clean = torch.stack([torch.from_numpy(np.array(draw(s, 64))).permute(2, 0, 1).float() for s in SCENES])
    noisy = (clean + 30 * torch.randn(clean.shape)).clamp(0, 255).round()
    files = [tmp_path / f"noisy{i}.png" for i in range(len(SCENES))]
    write_pictures(noisy / 255, files)
    prompts = [part for scene in SCENES for part in ("--prompt", scene.caption)]
    images = [part for file in files for part in ("--image", file)]
    details, _ = edit("denoise", *images, *prompts, "--guidance", "1")
    assert 20 < details["noise"] < 34 and "The noise is estimated at" in details["warnings"][0]
    after = torch.stack([pixels(file) for file in details["files"]])
    assert (after - clean).square().mean() < 0.6 * (noisy - clean).square().mean()
    told, _ = edit("denoise", *images, *prompts, "--guidance", "1", "--noise", "60")
    assert told["ticks"][0] > details["ticks"][0] and told["warnings"] == []


def test_no_noise_is_said(edit, photo):
    details, _ = edit("denoise", "--image", photo, "--noise", "0")
    assert details["steps"] == 0 and "There is no noise to take out" in details["warnings"][0]


def test_steps_that_phases_leave_no_room_for_are_said(edit, photo, lora):
    details, _ = edit("denoise", "--image", photo, "--noise", "20", "--lora", lora, "--steps", "4")
    assert details["warnings"][-1] == "From the level of this noise on there is 1 step, not 4."


@pytest.mark.parametrize("gamma", [0, 0.3])
def test_interpolation_ends_in_single_pictures(edit, tiny_base, tmp_path, gamma):
    prompts, seeds = ("a red star on a blue background", "a yellow heart on a red background"), (3, 5)
    ends = ("--prompt", prompts[0], "--to-prompt", prompts[1], "--seed", "3", "--to-seed", "5")
    how = ("--frames", "3", "--resolution", "64", "--gamma", gamma, *FAST)
    details, strip = edit("interpolate", *ends, *how)
    files = [tmp_path / f"out_{i}.png" for i in (1, 2, 3)]
    assert details["files"] == [str(file) for file in (tmp_path / "out.png", *files)] and details["size"] == [64, 64]
    frames = [pixels(file) for file in files]
    assert strip.equal(torch.cat(frames, -1))
    for prompt, seed, frame in zip(prompts, seeds, (frames[0], frames[2]), strict=True):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        condition = tiny_base.encode_prompts([prompt])
        latents = generate(tiny_base, condition, condition, noise, (1000, 500, 0), 1.0, gamma, seed=seed)
        assert tiny_base.decode(latents)[0].mul(255).round().equal(frame)
    assert not frames[1].equal(frames[0]) and not frames[1].equal(frames[2])


def test_a_seed_is_a_picture(edit, photo, mask, tmp_path):
    how = ("--image", photo, "--mask", mask, "--gamma", "0.5", *FAST)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        edit("inpaint", *how, "--seed", seed, out=f"{name}.png")
    assert sha256(tmp_path / "a.png") == sha256(tmp_path / "b.png") != sha256(tmp_path / "c.png")


def test_the_lora_its_strength_and_the_prompt_matter(edit, photo, mask, lora):
    def drawn(*more):
        return edit("inpaint", "--image", photo, "--mask", mask, "--steps", "4", "--guidance", "1", *more)[1]

    alone, with_lora = drawn(), drawn("--lora", lora)
    assert not with_lora.equal(alone)
    assert drawn("--lora", lora, "--strength", "0").equal(alone)
    assert not drawn("--prompt", "a red star").equal(alone)


def test_settings_that_the_lora_was_not_made_for_are_said(edit, photo, mask, lora):
    how = ("--image", photo, "--mask", mask, "--lora", lora, "--steps", "2", "--guidance", "7", "--denoise", "0.6")
    details, _ = edit("inpaint", *how)
    for warning in ("made for 4 steps, not 2", "CFG 7 is above 2", "starts at the nearest phase edge, which is 0.5"):
        assert any(warning in w for w in details["warnings"]), warning


def test_several_pictures_are_a_batch(edit, tmp_path):
    files = [save(tmp_path / f"{i}.png", draw(scene, 32)) for i, scene in enumerate(SCENES[:2])]
    masks = [save(tmp_path / f"m{x}.png", box((32, 32), (x, 0, x + 8, 32))) for x in (0, 24)]
    pairs = [part for f, m in zip(files, masks, strict=True) for part in ("--image", f, "--mask", m)]
    details, _ = edit("inpaint", *pairs, "--grow", "0", *FAST, out="made/new.png")
    assert details["files"] == [str(tmp_path / "made" / f"new_{i}.png") for i in (1, 2)]
    first, second = (pixels(file) for file in details["files"])
    assert first[..., 8:].equal(pixels(files[0])[..., 8:]) and not first.equal(pixels(files[0]))
    assert second[..., :24].equal(pixels(files[1])[..., :24]) and not second.equal(pixels(files[1]))


@pytest.mark.parametrize(("base", "size"), [("tiny-sdxl", (40, 33)), ("tiny-emoji", (72, 41))])
def test_other_families(edit, tmp_path, base, size):
    picture = save(tmp_path / "picture.png", draw(SCENES[0], 96).resize(size))
    details, out = edit("upscale", "--image", picture, "--steps", "2", base=base)
    means = torch.nn.functional.avg_pool2d(out, 2)
    assert details["size"] == [2 * side for side in size] and (means - pixels(picture)).abs().max() <= 1
    assert details["canvas"] == ([144, 96] if base == "tiny-emoji" else [80, 72])
    where = save(tmp_path / "where.png", box(size, (0, 0, 20, 20)))
    _, out = edit("inpaint", "--image", picture, "--mask", where, "--gamma", "1", *FAST, base=base)
    assert out[:, 28:].equal(pixels(picture)[:, 28:])


def test_a_clamped_one_phase_recipe_keeps_too(tiny_base):
    recipe = Recipe(family="sd15", mode="stochastic", phases=1, min_alpha=0.5)
    editor = Editor(tiny_base, recipe, null_of(tiny_base, None), steps=2)
    picture = torch.rand(2, 3, 32, 40)
    for operator in (Colorize(picture), Inpaint(picture, picture[:, 0].round())):
        edited = editor.edit(operator, tiny_base.encode_prompts(["a red star"]))
        assert edited.image.shape == (2, 3, 32, 40) and kept_error(operator, edited.image)["max"] <= 0.5 + 1e-3


def test_the_fast_vae_is_for_the_steps(edit, photo, tmp_path):
    how = ("--image", photo, *FAST)
    _, usual = edit("colorize", *how)
    assert edit("colorize", *how, "--fast-vae", bundled_folder(TINY) / "vae")[1].equal(usual)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    AutoencoderTiny(**blocks, **counts).save_pretrained(tmp_path / "other")
    details, out = edit("colorize", *how, "--fast-vae", tmp_path / "other")
    assert not out.equal(usual) and details["kept_error"]["max"] <= 1


def test_the_vae_stays_where_the_network_is(tiny_base):
    moves = []
    vae = AutoencoderTiny.from_pretrained(bundled_folder(TINY) / "vae")
    vae.to = lambda device: moves.append(device)
    editor = Editor(replace(tiny_base, vae=vae), tiny_base.alone, {}, steps=3, guidance=1)
    assert moves == [tiny_base.device]
    editor.edit(Colorize(torch.rand(1, 3, 64, 64)), tiny_base.encode_prompts(["x"]))
    assert {torch.device(device) for device in moves} == {tiny_base.device}


def test_pictures_that_are_no_multiple_and_of_one_pixel(edit, tmp_path):
    odd = save(tmp_path / "odd.png", draw(SCENES[3], 70).resize((70, 50)))
    details, out = edit("inpaint", "--image", odd, "--mask", save(tmp_path / "m.png", box((70, 50), (60, 0, 70, 50))),
                        "--grow", "4", *FAST)  # fmt: skip
    assert details["size"] == [70, 50] and details["canvas"] == [72, 64]
    assert out[..., :56].equal(pixels(odd)[..., :56])
    one = save(tmp_path / "one.png", Image.new("RGB", (1, 1), (200, 30, 60)))
    for kind in ("colorize", "upscale", "stroke", "denoise"):
        details, out = edit(kind, "--image", one, "--guidance", "1")
        assert out.shape[1:] == ((2, 2) if kind == "upscale" else (1, 1))
        assert details["kept_error"] is None or details["kept_error"]["max"] <= 1


def test_transparency_is_kept(edit, tmp_path, mask):
    picture = draw(SCENES[0], 64)
    picture.putalpha(box((64, 64), (10, 10, 60, 60), white=200))
    source = save(tmp_path / "clear.png", picture)
    for kind, own in (("inpaint", ("--mask", mask)), ("colorize", ()), ("stroke", ())):
        _, out = edit(kind, "--image", source, *own, *FAST)
        assert len(out) == 4 and out[3].equal(pixels(source)[3]), kind
    _, out = edit("upscale", "--image", source, *FAST)
    assert out[3].equal(pixels(source)[3].repeat_interleave(2, 0).repeat_interleave(2, 1))
    _, out = edit("outpaint", "--image", source, "--top", "8", *FAST)
    assert out[3, 8:].equal(pixels(source)[3]) and out[3, :8].eq(255).all()
