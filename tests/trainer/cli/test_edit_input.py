"""What `pcm edit` refuses, each in a sentence and before anything is written."""

import re
from dataclasses import replace

import pytest
from PIL import Image

from phased_consistency.trainer.inference.edit import Editor
from phased_consistency.trainer.tiny.bundled import bundled_folder
from support.edit_files import save
from support.runs import TINY

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("inpaint", {"--image": "gone.png"}, "No file at gone.png"),
        ("inpaint", {"--mask": "gone.png"}, "No file at gone.png"),
        ("inpaint", {"--image": "{tmp}/text.png"}, "text.png cannot be read as a picture"),
        ("inpaint", {"--image": "{tmp}/half.png"}, "half.png cannot be read as a picture"),
        ("inpaint", {"--image": "{tmp}/float.tif"}, "float.tif holds floating-point numbers"),
        ("inpaint", {"--mask": "{tmp}/small.png"}, "The mask is 32x16 and the picture 64x64"),
        ("inpaint", {"--mask": None}, "photo.png has no transparent parts to draw in: give --mask"),
        ("inpaint", {"--grow": "-1"}, "grow is -1"),
        ("inpaint", {"--denoise": "0"}, "denoise must be above 0 and at most 1; got 0"),
        ("inpaint", {"--denoise": "1.5"}, "denoise must be above 0 and at most 1; got 1.5"),
        ("inpaint", {"--projection": "pixels"}, "--projection is 'pixels'; available: picture, latent, none"),
        ("inpaint", {"--form": "round"}, "--form is 'round'; available: residual, plain"),
        ("inpaint", {"--every": "0"}, "every is 0; 1 projects at each step"),
        ("inpaint", {"--every": "2", "--projection": "none"}, "--every is for --projection picture, and it is none"),
        ("inpaint", {"--fast-vae": "gone"}, "No tiny autoencoder in gone"),
        ("inpaint", {"--fast-vae": "{sd3}/vae"}, "has latents of 16 channels, tiny-sd15 of 4"),
        ("inpaint", {"--fast-vae": "{sd3}/transformer"}, "holds SD3Transformer2DModel; the fast VAE must be"),
        ("inpaint", {"--factor": "2"}, "No such option: --factor"),
        ("outpaint", {}, "Outpainting adds pixels on at least one side"),
        ("outpaint", {"--left": "-8", "--right": "8"}, "Outpainting adds pixels on at least one side"),
        ("colorize", {"--projection": "latent"}, "--projection latent is for inpaint and outpaint"),
        ("colorize", {"--mask": "{tmp}/mask.png"}, "No such option: --mask"),
        ("colorize", {"--seed": str(2**64)}, "Invalid value for '--seed'"),
        ("upscale", {"--factor": "0"}, "factor is 0; it must be a whole number, 1 or more"),
        ("upscale", {"--factor": "1.5"}, "Invalid value for '--factor'"),
        ("upscale", {"--factor": "5", "--base": "tiny-emoji"}, "would be 320x320; tiny-emoji draws at most 256 pixels"),
        ("stroke", {"--denoise": "0"}, "denoise must be above 0"),
        ("stroke", {"--every": "2"}, "No such option: --every"),
        ("stroke", {"--strength": "0.5"}, "--strength is the LoRA's, and there is no --lora"),
        ("stroke", {"--steps": "0"}, "steps must be between 1 and"),
        ("stroke", {"--gamma": "2"}, "gamma must be between 0"),
        ("stroke", {"--out": "out.jpg"}, "--out is 'out.jpg'; write a name that ends in .png"),
        ("stroke", {"--dtype": "int8"}, "--dtype is 'int8'"),
        ("denoise", {"--noise": "-3"}, "--noise is -3; a standard deviation of 0 to 255 levels"),
        ("denoise", {"--steps": "-1"}, "steps must be between 1 and"),
        ("interpolate", {}, "Both ends have one prompt and one seed"),
        ("interpolate", {"--to-seed": "1", "--frames": "1"}, "--frames is 1; at least 2"),
        ("interpolate", {"--to-seed": "1", "--resolution": "100"}, "resolution 100 is not a multiple of 32"),
        ("interpolate", {"--to-seed": "1", "--image": "{tmp}/photo.png"}, "No such option: --image"),
        ("interpolate", {"--to-seed": "1", "--prompt": None}, "Missing option '--prompt'"),
    ],
)
def test_bad_input(pcm, photo, mask, tmp_path, kind, changes, message):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:200])
    save(tmp_path / "small.png", Image.new("L", (32, 16), 255))
    save(tmp_path / "float.tif", Image.new("F", (64, 64)))
    options = {"--base": TINY, "--out": tmp_path / "made" / "out.png", "--prompt": "a star", "--guidance": "1"}
    options |= {"--image": photo} if kind != "interpolate" else {}
    options |= {"--mask": mask} if kind == "inpaint" else {}
    words = [part for pair in (options | changes).items() if pair[1] is not None for part in pair]
    places = {"{tmp}": tmp_path, "{sd3}": bundled_folder("tiny-emoji")}
    result = pcm("edit", kind, *(re.sub(r"{\w+}", lambda place: str(places[place[0]]), str(word)) for word in words))
    told = " ".join(result.err.replace("│", " ").split())
    assert result.code == 2 and message in told and "Traceback" not in told, result
    assert not (tmp_path / "made").exists() and result.out == ""


def test_pictures_prompts_and_masks_that_do_not_fit(pcm, photo, mask, tmp_path):
    small = save(tmp_path / "small.png", Image.new("RGB", (32, 16)))
    common = ("edit", "stroke", "--base", TINY, "--out", tmp_path / "out.png", "--image", photo)
    told = pcm(*common, "--image", small)
    assert told.code == 2 and "photo.png is 64x64" in told.err and "small.png is 32x16" in told.err
    told = pcm(*common, *("--prompt", "x") * 3)
    assert told.code == 2 and "3 prompts for 1 pictures" in told.err
    told = pcm("edit", "inpaint", *common[2:], "--mask", mask, "--mask", mask)
    assert told.code == 2 and "2 masks for 1 pictures: give one mask, or one for each picture" in told.err


def test_bases_without_a_vae(tiny_base):
    with pytest.raises(ValueError, match="tiny-sd15 draws without a VAE"):
        Editor(replace(tiny_base, vae=None), tiny_base.alone, {})


def test_a_lora_of_another_family(pcm, photo, lora, tmp_path):
    options = ("--base", "tiny-emoji", "--lora", lora, "--image", photo, "--out", tmp_path / "out.png")
    result = pcm("edit", "stroke", *options)
    assert result.code == 2 and "is a LoRA for SD1.5, the base is SD3" in result.err
