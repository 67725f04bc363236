"""A verb imports what it uses: no help, header or mistake waits for the libraries that train."""

import json
import subprocess
import sys

import pytest

from phased_consistency.trainer.tiny.bundled import bundled_folder

LIBRARIES = ("accelerate", "diffusers", "peft", "transformers")
# Runs `pcm` with each list of words in one process; prints the exit code and what is imported by then.
RUN = """
import contextlib, io, json, sys
from phased_consistency.trainer.cli.main import main
results = []
for words in json.load(sys.stdin):
    sys.argv = ["pcm", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    results.append([code, err.getvalue()[:500], [name for name in WATCHED if name in sys.modules]])
json.dump(results, sys.stdout)
""".replace("WATCHED", repr((*LIBRARIES, "torch")))


def run(*commands: tuple) -> list[tuple[int, str, list[str]]]:
    """(exit code, stderr, libraries that are imported) after each of these commands of one process."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    ended = subprocess.run([sys.executable, "-c", RUN], input=words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_help_and_mistyped_verbs_import_no_library():
    commands = [
        ("--help",), ("train", "--help"), ("edit", "inpaint", "--help"), ("evaluate", "--help"), ("bench", "--help"),
        ("trian",), ("edit", "inpiant"), ("inspect", "x.safetensors", "--jsn"), ("check", "x.safetensors"),
    ]  # fmt: skip
    for command, (code, err, imported) in zip(commands, run(*commands), strict=True):
        assert (code, imported) == (0 if "--help" in command else 2, []), (command, err)


def test_files_and_settings_import_none_that_trains(photo, tmp_path):
    lora = bundled_folder("tiny-emoji") / "pcm_demo_emoji_4step.safetensors"
    gone, out = tmp_path / "gone.safetensors", ("--out", tmp_path / "out.png")
    base, image = ("--base", "tiny-sd15"), ("--image", photo)
    right = [
        ("inspect", lora), ("inspect", lora, "--json"), ("doctor",),
        ("tag", lora, "a=b", "--out", tmp_path / "tagged.safetensors"), ("panels", lora, "--out", tmp_path / "p.html"),
        ("sidecars", tmp_path / "tagged.safetensors"),
    ]  # fmt: skip
    wrong = [
        ("inspect", gone), ("report", gone), ("tag", gone, "a=b"), ("panels", gone, "--out", tmp_path / "p.html"),
        ("sidecars", gone),
        ("check", gone, *base), ("convert", gone, out[1], "--to", "kohya"), ("resize", gone, *out, "--rank", "2"),
        ("merge", lora, f"{gone}:0.5", *out),
        ("sample", *base, "--lora", gone, "--prompt", "x", *out),
        ("evaluate", *base, "--lora", gone, *out),
        ("edit", "stroke", *base, "--lora", gone, *image, *out),
        ("edit", "inpaint", *base, "--image", tmp_path / "gone.png", *out),
        ("edit", "colorize", *base, *image, "--projection", "pixels", *out),
        ("train", "--preset", "dmeo"), ("train", "--preset", "demo", "train.stpes=3"), ("train", gone),
        ("train", "--preset", "demo", "train.steps=0", "--dry-run"), ("bench", "train.stpes=3"),
        ("doctor", "--preset", "dmeo"),
    ]  # fmt: skip
    for command, (code, err, imported) in zip([*right, *wrong], run(*right, *wrong), strict=True):
        assert (code, imported) == (2 if command in wrong else 0, ["torch"]), (command, err)
        assert "Traceback" not in err and (command in right or "Error" in err)


@pytest.mark.parametrize("verb", ["check", "sample"])
def test_a_mistyped_name_is_said_as_by_inspect(fails, tmp_path, verb):
    gone = tmp_path / "gone.safetensors"
    words = {"check": (gone,), "sample": ("--lora", gone, "--prompt", "x", "--out", tmp_path / "x.png")}[verb]
    said = fails(2, verb, *words, "--base", "tiny-sd15")
    assert said == fails(2, "inspect", gone) == f"Error: No file at {gone}. Check the name; only .safetensors files " \
        "are read.\n"  # fmt: skip
