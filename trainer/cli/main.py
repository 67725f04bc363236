"""`pcm`: the verbs, thin. Logs go to stderr, results to stdout; exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .bench import bench, bench_data
from .edit import edit
from .options import (
    Base,
    Configs,
    Family,
    Json,
    Parts,
    Reading,
    Resolution,
    Sampling,
    Settings,
    Tokenizer,
    answer,
    configured,
    with_options,
)
from .share import VERBS as SHARING

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train few-step LoRAs (phased consistency and its relatives) on your own checkpoint; sample them, edit "
    "pictures with them, compare them.",
)


@app.command()
def train(
    settings: Settings = None,
    preset: Annotated[str, typer.Option(help="Start from this preset; see below.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the config, the plan, the memory it takes.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the settings or data have changed since.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a few-step LoRA. The same command goes on where a stopped run left off.

    Example: pcm train --preset sd15-4step base.path=my-checkpoint.safetensors name=my-pcm

    Presets: sd15, sdxl or sd3, then -1step, -2step, -4step, -8step (each also -adv), -4step-normalcfg,
    -8step-normalcfg, -stochastic (also -adv); lcm-, tcd-, ctm-, cd-, dscd-, progressive-, ct-, ufogen- or lcf- and a
    family; demo, lcf-demo; and digits, which starts from nothing. Every setting is
    section.key=value (base.path, data.images, train.steps, ...); --dry-run prints them all. Without data.images the
    teacher makes the latents from prompts.
    """
    config = configured(settings, preset)
    if dry_run:
        from ..training.plan import plan

        details = plan(config, accept_changes)
        answer(details | {"config": config.model_dump(mode="json")}, as_json, details["text"])
        return
    from accelerate import PartialState

    from ..reporting.progress import ProgressBar
    from ..training.loop import RunStopped
    from ..training.loop import train as run

    try:
        with ProgressBar() as bar:
            path = run(config, bar, accept_changes)
    except RunStopped as stopped:  # as it was asked to
        typer.echo(stopped, err=True)
        raise typer.Exit(1) from None
    if not PartialState().is_main_process:
        return
    made = "base" if path.is_dir() else "lora"
    answer({made: str(path), "run": str(config.run_folder), "steps": config.train.steps}, as_json, f"Done: {path}")


@app.command()
@with_options
def sample(
    options: Sampling,
    prompt: Annotated[list[str], typer.Option(help="Repeat for several columns.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    steps: Annotated[str, typer.Option(help="One row for each, such as 1,2,4,8.")] = "4",
    resolution: Resolution = None,
) -> None:
    """Draw a labelled grid with the samplers that run in ComfyUI: a row for each number of steps, a column a prompt.

    Example: pcm sample --base tiny-sd15 --lora out/demo/lora.safetensors --prompt "a red star on a blue background"
    --steps 1,2,4,8 --out grid.png
    """
    from ..inference.sample import sample_grid

    numbers, o = _steps(steps), options
    how = (o.lora, numbers, o.guidance, o.negative, o.strength, o.gamma, o.seed, resolution)
    details = sample_grid(o.load(o.lora), prompt, out, *how)
    for warning in details["warnings"]:
        typer.echo(warning, err=True)
    answer(details, o.as_json, f"{out}: {len(details['rows'])} rows of {len(prompt)} pictures")


app.add_typer(edit, name="edit")


@app.command()
@with_options
def evaluate(
    options: Reading,
    lora: Annotated[list[Path], typer.Option(help="LoRA to evaluate. Repeat to compare several.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    steps: Annotated[str, typer.Option(help="The LoRAs' numbers of steps.")] = "1,2,4,8",
    prompts: Annotated[
        str, typer.Option(help="File, one a line; default: the list that ships, or a tiny base's held-out ones.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Pictures in each set.")] = 64,
    seed: int = 0,
    guidance: Annotated[
        float, typer.Option(help="The teacher's CFG; default: what the LoRA was distilled under, or 7.5.")
    ] = None,
    features: Annotated[
        list[str],
        typer.Option(help="latents, pixels, inception, or a CLIP's folder. Repeat for several; default: the named."),
    ] = None,
    clip: Annotated[Path, typer.Option(help="Folder of a CLIP model, for the CLIP score.")] = None,
    resolution: Resolution = None,
) -> None:
    """Compare LoRAs with the teacher at as many evaluations, from the same prompts and noise; write a report.

    report.json, report.md, plots and a grid: paired error and distances to the teacher at 40 steps, consistency across
    step counts, seed diversity, CFG sweep, negative prompts; the teacher with DDIM, Euler and DPM-Solver++ beside.

    Example: pcm evaluate --base tiny-sd15 --lora out/demo/lora.safetensors --steps 1,2,4,8 --out out/evaluate
    """
    from ..evaluation.report import evaluate as run

    how = options.how() | {"dtype": options.dtype, "resolution": resolution}
    how |= {"clip": clip, "features": features, "guidance": guidance}
    say = lambda line: typer.echo(line, err=True)  # noqa: E731
    report = run(
        options.base, lora, out, steps=_steps(steps), prompts=prompts, pictures=pictures, seed=seed, say=say, **how
    )
    for line in [*report["warnings"], *(f"Left out. {line}" for line in report["left_out"])]:
        say(line)
    answer(report, options.as_json, f"{out / 'report.md'}: {len(report['rows'])} settings, {pictures} pictures of each")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/pcm-lora.")],
    out: Annotated[Path, typer.Option(help="HTML to write; default: report.html in the run folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a run as one HTML page: what came out, curves, pictures, costs, settings, starts and stops.

    Every run writes it at its end; this is for one that is under way, or was killed.

    Example: pcm report runs/pcm-lora
    """
    from ..reporting.page import write_report

    details = write_report(run, out)
    answer(details, as_json, details["text"])


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A LoRA in .safetensors.")], as_json: Json = False) -> None:
    """Print what a LoRA's header says: recipe, family, rank, alpha, keys, hashes, metadata."""
    from ..lora.describe import describe, describe_text

    details = describe(file)
    answer(details, as_json, describe_text(details))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A LoRA in .safetensors.")],
    base: Base,
    family: Family = None,
    tokenizer: Tokenizer = None,
    config: Configs = None,
    parts: Parts = None,
    as_json: Json = False,
) -> None:
    """Load a LoRA through diffusers and by hand, in fp32, and compare: unmatched keys, greatest output difference.

    Exits with 1 when a key is unmatched or the outputs differ.
    """
    from ..lora.check import check_parity
    from ..lora.install import load_for_check

    how = {"family": family, "tokenizer": tokenizer, "config": config, "parts": parts}
    result = check_parity(file, load_for_check(base, **how))
    answer(result, as_json, result["text"])
    if not result["passed"]:
        raise typer.Exit(1)


@app.command()
def doctor(
    settings: Settings = None,
    preset: Annotated[str, typer.Option(help="Also say what this preset would need.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can do, what is missing, and what a given config will need."""
    from ..system.machine import examine
    from .doctor import report

    details = examine()
    if settings or preset:
        from ..training.plan import plan

        details["run"] = plan(configured(settings, preset))
    answer(details, as_json, report(details))


app.command()(bench)
app.command()(bench_data)
for verb in SHARING:
    app.command()(verb)


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--steps is {text!r}; write numbers with commas between them, such as 1,2,4,8.") from None


def _quiet_libraries() -> None:
    """Our own errors say what matters; the libraries' notices about other things would bury them."""
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # imported by peft where they are installed
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Run a verb; errors a user can mend are one message without a traceback (PCM_DEBUG=1 shows it)."""
    _quiet_libraries()
    try:
        with contextlib.suppress(BrokenPipeError):
            app()
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if os.environ.get("PCM_DEBUG"):
            raise
        sys.exit(_fail(str(error), 2))
    except (RuntimeError, OSError, MemoryError) as error:
        if os.environ.get("PCM_DEBUG"):
            raise
        sys.exit(_fail(_advice(error), 1))


def _fail(message: str, code: int) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return code


def _advice(error: Exception) -> str:
    """The message; of a run that ran out of memory it already names what would save how much."""
    from ..efficiency.memory import out_of_memory

    if out_of_memory(error):
        return (
            f"{str(error) or 'Out of memory.'}\n"
            "Try a smaller resolution, --dtype bf16, or end what else holds the device's memory."
        )
    return str(error)


if __name__ == "__main__":
    main()
