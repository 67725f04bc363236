"""The demo's files for ComfyUI, and how a host is found and its folder laid out."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file

from phased_consistency.samplers.lora_file import read_header
from phased_consistency.samplers.lora_info import recipe_of
from phased_consistency.trainer import comfy
from phased_consistency.trainer.system import comfyui as host
from phased_consistency.trainer.tiny import demo_pictures
from phased_consistency.trainer.tiny.comfy import BASE, CHECKPOINT, LORA, PICTURES, main, write_files
from phased_consistency.trainer.tiny.taesd import full_size


def test_the_wider_autoencoder_does_what_the_narrow_one_does():
    """To the last bits: there are more zeros to add."""
    narrow = AutoencoderTiny.from_pretrained(BASE / "vae").eval()
    wide = AutoencoderTiny(latent_channels=16).eval()
    shape = narrow.config
    wide.load_state_dict(full_size(narrow.state_dict(), shape.num_encoder_blocks, shape.num_decoder_blocks))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = narrow.encode(pixels).latents
        torch.testing.assert_close(wide.encode(pixels).latents, latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(wide.decode(latents).sample, narrow.decode(latents).sample, rtol=0, atol=1e-5)


def test_the_command_writes_every_file_once(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    checkpoint, lora = tmp_path / "models/checkpoints" / CHECKPOINT, tmp_path / "models/loras" / LORA.name
    text = capsys.readouterr().out
    assert str(checkpoint) in text and str(lora) in text and "00_demo" in text
    assert lora.read_bytes() == LORA.read_bytes() and read_header(lora).family == "sd3"
    assert "model.diffusion_model.joint_blocks.2.x_block.attn.qkv.weight" in load_file(checkpoint)
    pictures = [tmp_path / "input" / f"pcm_demo_{edit}.png" for edit in sorted(demo_pictures.PICTURES)]
    assert [path.read_bytes() for path in pictures] == [(PICTURES / path.name).read_bytes() for path in pictures]
    files = [checkpoint, lora, *pictures]
    times = [path.stat().st_mtime_ns for path in files]
    assert write_files(tmp_path) == files
    assert [path.stat().st_mtime_ns for path in files] == times
    assert not [path for path in tmp_path.rglob("*.part")]


def test_the_bundled_pictures_are_those_described(tmp_path):
    """Run the command after a change to them (see there)."""
    assert demo_pictures.main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in PICTURES.iterdir()}
    for path in tmp_path.iterdir():
        with Image.open(path) as drawn, Image.open(PICTURES / path.name) as bundled:
            assert drawn.mode == bundled.mode
            # another Pillow scales a little otherwise
            assert np.abs(np.subtract(drawn, bundled, dtype=np.float64)).mean() < 2


def test_the_command_leaves_other_files_alone(tmp_path, capsys):
    lora = tmp_path / "models/loras" / LORA.name
    lora.parent.mkdir(parents=True)
    lora.write_bytes(b"mine")
    assert main([str(tmp_path)]) == 2
    assert "is another file. Move it away, or replace it with --overwrite." in capsys.readouterr().err
    assert lora.read_bytes() == b"mine" and not (tmp_path / "models/checkpoints").exists()
    assert main([str(tmp_path), "--overwrite"]) == 0
    assert lora.read_bytes() == LORA.read_bytes()


def test_the_lora_says_how_it_is_sampled():
    recipe = recipe_of(read_header(LORA))
    assert (recipe.phases, recipe.guidance, recipe.mode, recipe.prediction) == (4, 1.0, "deterministic", "flow")


@pytest.fixture
def comfyui(tmp_path):
    """A folder that looks like a ComfyUI with a virtual environment."""
    folder = tmp_path / "ComfyUI"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (folder / "main.py").touch()
    return folder


def test_comfyui_is_found_where_the_variable_says(comfyui, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setenv("COMFYUI_PATH", f"{tmp_path / 'nowhere'}{host.os.pathsep}{comfyui}")
    assert comfy.find() == comfyui
    assert host.python_of(comfyui) == str(comfyui / ".venv" / "bin" / "python")
    monkeypatch.setenv("COMFYUI_PYTHON", "another")
    assert host.python_of(comfyui) == "another"
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="COMFYUI_PATH is .*nowhere, where there is no main.py"):
        comfy.find()


def test_without_the_variable_it_is_comfy_clis(comfyui, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(host, "default_workspace", lambda: comfyui)
    assert comfy.find() == comfyui
    (comfyui / "main.py").unlink()
    assert comfy.find() is None


def test_the_comfyui_around_the_pack_comes_first(comfyui, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(comfy, "PACK", comfyui / "custom_nodes" / "phased-consistency")
    assert comfy.find() == comfyui


def test_another_copy_of_the_pack_is_left_alone(tmp_path, monkeypatch):
    """As where --out is a ComfyUI that has one already."""
    place = tmp_path / "custom_nodes" / "phased-consistency"
    place.mkdir(parents=True)
    (place / "mine.py").touch()
    with pytest.raises(ValueError, match="is another copy of the pack. Choose another folder with --out"):
        comfy.prepare(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["mine.py"]
    monkeypatch.setattr(comfy, "PACK", place)
    comfy.prepare(tmp_path)
    assert (place / "mine.py").is_file() and not place.is_symlink()


def test_a_comfyui_that_ends_at_once_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    (tmp_path / "main.py").write_text("raise SystemExit('no torch here')")
    with pytest.raises(RuntimeError, match=r"ComfyUI ended with status 1\. Its log ends:\nno torch here"):
        host.Host(tmp_path, tmp_path)


def test_a_port_in_use_gives_the_next():
    wanted = host.free_port()
    with host.socket.socket() as taken:
        taken.bind((host.ADDRESS, wanted))
        taken.listen()
        assert wanted < host.free_port(wanted) < wanted + 100


def test_the_folder_holds_pack_and_files(tmp_path):
    comfy.prepare(tmp_path)
    place = tmp_path / "custom_nodes" / "phased-consistency"
    assert place.is_symlink() and place.resolve() == comfy.PACK
    assert (tmp_path / "models" / "loras" / LORA.name).is_file()


def test_a_lora_of_ones_own_comes_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    comfy.OWN_LORA.parent.mkdir(parents=True)
    comfy.OWN_LORA.write_bytes(b"mine")
    comfy.prepare(tmp_path / "base")
    assert (tmp_path / "base/models/loras" / comfy.OWN_NAME).read_bytes() == b"mine"
    assert f"{comfy.OWN_LORA} is {comfy.OWN_NAME}" in capsys.readouterr().out


def test_where_links_are_not_possible_the_pack_is_copied_each_time(tmp_path, monkeypatch):
    def refuse(*args, **keywords):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(comfy.Path, "symlink_to", refuse)
    place = tmp_path / "custom_nodes" / "phased-consistency"
    for _ in range(2):
        comfy.prepare(tmp_path)
        assert (place / "nodes" / "demo.py").is_file() and (place / "trainer/tiny/emoji/prompts.txt").is_file()
        assert not (place / ".git").exists() and not (place / "tests").exists()
        (place / "old.py").touch()
    comfy.prepare(tmp_path)
    assert not (place / "old.py").exists()


def test_comfy_cli_is_asked_to_install(tmp_path, monkeypatch):
    """The commands that would be run; comfy-cli 1.23 knows these options."""
    ran = []
    monkeypatch.setattr(comfy.venv, "create", lambda *args, **keywords: None)
    monkeypatch.setattr(comfy, "_run", lambda *command: ran.append(command))
    monkeypatch.setattr(comfy, "device_option", lambda: "--cpu")
    assert comfy.install(tmp_path / "ComfyUI", tmp_path / "cli") == tmp_path / "ComfyUI"
    assert ran[0][1:] == ("-m", "pip", "install", "--quiet", "comfy-cli")
    options = ("--skip-prompt", "--workspace", str(tmp_path / "ComfyUI"), "install", "--version", "latest", "--cpu")
    assert ran[1][1:] == options


def test_a_failed_install_names_its_command(monkeypatch):
    monkeypatch.setattr(comfy.subprocess, "run", lambda *args, **keywords: host.subprocess.CompletedProcess(args, 3))
    with pytest.raises(RuntimeError, match="failed with status 3: comfy install.*set COMFYUI_PATH"):
        comfy._run("comfy", "install")
