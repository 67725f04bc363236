"""`make comfy`: ComfyUI with this pack and a base so small that a CPU draws with it, in a folder of its own.

    python -m phased_consistency.trainer.comfy [--out out/comfy] [--port 8188]

ComfyUI is the one in $COMFYUI_PATH, else the one that this pack is in, else comfy-cli's in its default place;
where there is none, comfy-cli installs it there. It runs on `out` as its --base-directory, so nothing of its
own changes. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

from .system.comfyui import PYTHONS, Host, default_workspace, environment, free_port, has_gpu, hosts
from .tiny.comfy import write_files

PACK = Path(__file__).resolve().parents[1]
NAME = "phased-consistency"
COPIED = ".copied"  # marks a copy of the pack that was made here, and may be made anew
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "out", "runs", "tests")  # of a copy of the pack
OWN_LORA = Path("out/demo/lora.safetensors")  # that `make demo` has made
OWN_NAME = "pcm_demo_own.safetensors"  # it, in ComfyUI
NEXT = """
ComfyUI is at {url}

  1. Open it in a browser.
  2. Templates > phased-consistency > 00_demo
  3. Run: a picture in 4 steps. Change the words, and run again.
  4. The templates below it edit pictures that are there already, with a click each.

Its log is {log}. Ctrl-C ends it."""


def main(argv: list[str] | None = None) -> int:
    """Start ComfyUI and stay until it ends; returns 0, or after a sentence on what failed 1 or 2, as `pcm` does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/comfy"), help="its --base-directory")
    parser.add_argument("--port", type=int, default=8188, help="if it is in use, the next free one")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return serve(args.out, args.port)
    except KeyboardInterrupt:
        print("\nComfyUI has ended.")
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def serve(base: Path, port: int) -> int:
    """Run ComfyUI on `base` in the foreground; returns its exit status."""
    folder = find() or install(default_workspace(), base / "comfy-cli")
    print(f"Starting {folder}.", flush=True)
    prepare(base)
    with Host(folder, base, free_port(port), cpu=not has_gpu(folder)) as host:
        print(NEXT.format(url=host.url, log=host.log_file), flush=True)
        status = host.wait()
        print(f"ComfyUI has ended by itself, with status {status}. Its log ends:\n{host.log[-3000:]}", file=sys.stderr)
    return status


def find() -> Path | None:
    """The first ComfyUI on this machine. Raises ValueError when $COMFYUI_PATH names none."""
    installed, named = hosts(), os.environ.get("COMFYUI_PATH")
    if named and not installed:
        raise ValueError(
            f"COMFYUI_PATH is {named}, where there is no main.py. Set it to the folder of a ComfyUI, or unset it."
        )

    # the one that this pack is in, unless the user names another
    around = PACK.parents[1]
    if not named and PACK.parent.name == "custom_nodes" and (around / "main.py").is_file():
        return around
    return next(iter(installed), None)


def prepare(base: Path) -> None:
    """Lay out ComfyUI's base directory: this pack, the demo's checkpoint and LoRA, and the user's own from `make demo`.

    Raises ValueError where another copy of the pack is in the way.
    """
    place = base / "custom_nodes" / NAME
    # before anything is written: a copy that was not made here may hold the user's work
    if place.is_dir() and not place.is_symlink() and place.resolve() != PACK and not (place / COPIED).is_file():
        raise ValueError(f"{place} is another copy of the pack. Choose another folder with --out, or move it away.")
    write_files(base, overwrite=True)
    if OWN_LORA.is_file():
        shutil.copyfile(OWN_LORA, base / "models" / "loras" / OWN_NAME)
        print(f"{OWN_LORA} is {OWN_NAME} in the node Load PCM LoRA.", flush=True)
    if place.resolve() != PACK:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            shutil.rmtree(place)
        _link_or_copy(place, base.resolve())


def _link_or_copy(place: Path, base: Path) -> None:
    """Make the pack appear at `place`, as a link, or where there can be none as a copy."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        target = {name for name in names if Path(folder, name).resolve() == base}  # never the copy into itself
        return target | shutil.ignore_patterns(*LEFT_OUT)(folder, names)

    try:
        place.symlink_to(PACK, target_is_directory=True)
    except OSError:  # Windows without developer mode
        shutil.copytree(PACK, place, ignore=left_out)
        (place / COPIED).touch()


def install(folder: Path, tools: Path) -> Path:
    """Install ComfyUI into `folder` with comfy-cli, which gets a virtual environment of its own in `tools`.

    Raises RuntimeError with the command that failed.
    """
    print(f"There is no ComfyUI yet: comfy-cli installs it into {folder}, several GB with its torch.", flush=True)
    venv.create(tools, with_pip=True)
    scripts = tools / Path(PYTHONS[0] if os.name != "nt" else PYTHONS[2]).parent.name
    _run(str(scripts / "python"), "-m", "pip", "install", "--quiet", "comfy-cli")
    command = [str(scripts / "comfy"), "--skip-prompt", "--workspace", str(folder), "install", "--version", "latest"]
    _run(*command, device_option())
    return folder


def device_option() -> str:
    """comfy-cli's option for the device that torch is installed for, as far as can be told."""
    if shutil.which("nvidia-smi"):
        return "--nvidia"
    return "--m-series" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "--cpu"


def _run(*command: str) -> None:
    """Run a command. Raises RuntimeError where it fails."""
    if status := subprocess.run(command, env=environment(DO_NOT_TRACK="1")).returncode:
        raise RuntimeError(
            f"This failed with status {status}: {' '.join(command)}. See above why; or install ComfyUI in any other "
            "way, set COMFYUI_PATH to its folder, and run this again."
        )


if __name__ == "__main__":
    sys.exit(main())
