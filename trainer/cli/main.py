"""`pcm`: the verbs, thin. Logs go to stderr, results to stdout; exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config.presets import preset_names
from . import bench, doctor, lists, share
from .edit import edit
from .options import (
    DRAWING,
    LORA_FILES,
    MACHINE,
    TRAINING,
    BaseOptions,
    BasePath,
    ConfigsFolder,
    Family,
    Json,
    LoraFile,
    PartsFolder,
    Resolution,
    SamplingOptions,
    Seed,
    Settings,
    Tokenizer,
    answer,
    check_files,
    configured,
    place_option,
    preset_option,
    verb,
)
from .watch import watch

# What click, which typer has within itself or beside it, raises for words that it cannot read.
USAGE_ERROR = typer.BadParameter.__base__.__base__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train few-step LoRAs (phased consistency and its relatives) on your own checkpoint; sample them, edit "
    "pictures with them, compare them.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..system.machine import package_version

        typer.echo(f"pcm {package_version()}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version, and end.")
    ] = False,
) -> None:
    """What `pcm` takes before a verb: all is done in callbacks of its options."""


@verb(app, TRAINING, epilog=f"Presets: {preset_names()}.")
def train(
    settings: Settings = None,
    preset: Annotated[str, preset_option("Start from this preset; see below.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the config as TOML, with the plan and the memory as comments.")
    ] = False,
    write_config: Annotated[
        Path, typer.Option(help="Write the config to this TOML file, each setting with what it does, and end.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the settings or data have changed since.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a few-step LoRA. The same command goes on where a stopped run left off.

    Example: pcm train --preset sd15-4step base.path=my-checkpoint.safetensors name=my-pcm

    Every setting is section.key=value (base.path, data.images, train.steps, ...); pcm settings lists them, and pcm
    presets the presets. Without data.images the teacher makes the latents from prompts. --dry-run > run.toml writes
    down a run, and pcm train run.toml repeats it. The preset digits starts from nothing.
    """
    config = configured(settings, preset)
    if write_config:
        from ..config.write import write_config as write

        write(config, write_config)
        answer({"config": str(write_config)}, as_json, f"{write_config}: change it, then pcm train {write_config}")
        return
    if dry_run:
        from ..config.write import config_text
        from ..training.plan import plan

        details = plan(config, accept_changes)
        config = config.changed(train=details["settled"])
        comments = "".join(f"# {line}\n" for line in details["text"].splitlines())
        answer(details | {"config": config.model_dump(mode="json")}, as_json, f"{config_text(config)}\n{comments}")
        return

    from accelerate import PartialState

    from ..reporting.progress import progress_on_stderr
    from ..training.failure import RunStopped
    from ..training.loop import train as run

    try:
        with progress_on_stderr() as bar:
            path = run(config, bar, accept_changes)
    except RunStopped as stopped:  # as it was asked to
        typer.echo(stopped, err=True)
        if as_json:
            answer({"stopped": str(stopped)}, as_json, "")
        raise typer.Exit(1) from None
    if not PartialState().is_main_process:
        return
    product = "base" if path.is_dir() else "lora"
    answer({product: str(path), "run": str(config.run_folder), "steps": config.train.steps}, as_json, f"Done: {path}")


@verb(app, TRAINING, name="report")
def run_page(
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


for function in (watch, lists.settings, lists.presets):
    verb(app, TRAINING)(function)


@verb(app, DRAWING)
def sample(
    base: BaseOptions,
    sampling: SamplingOptions,
    prompt: Annotated[list[str], typer.Option(help="Repeat for several columns.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    steps: Annotated[str, typer.Option(help="One row for each, such as 1,2,4,8.")] = "4",
    resolution: Resolution = None,
    as_json: Json = False,
) -> None:
    """Draw a labelled grid with the samplers that run in ComfyUI: a row for each number of steps, a column a prompt.

    Example: pcm sample --base tiny-emoji --lora out/demo/lora.safetensors --prompt "a fox on a blue background"
    --steps 1,2,4,8 --out grid.png
    """
    check_files(sampling.lora)

    from ..inference.sample import sample_grid

    details = sample_grid(
        base.load(sampling.lora),
        prompt,
        out,
        lora=sampling.lora,
        steps=_steps(steps),
        guidance=sampling.guidance,
        negative=sampling.negative,
        strength=sampling.strength,
        gamma=sampling.gamma,
        seed=sampling.seed,
        resolution=resolution,
    )
    for warning in details["warnings"]:
        typer.echo(warning, err=True)
    answer(details, as_json, f"{out}: {len(details['rows'])} rows of {len(prompt)} pictures")


app.add_typer(edit, name="edit", rich_help_panel=DRAWING)


@verb(app, DRAWING)
def evaluate(
    base: BaseOptions,
    lora: Annotated[list[Path], typer.Option(help="LoRA to evaluate. Repeat to compare several.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    steps: Annotated[str, typer.Option(help="The LoRAs' numbers of steps.")] = "1,2,4,8",
    prompts: Annotated[
        str, place_option(help="File, one a line; default: the list that ships, or a tiny base's held-out ones.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Pictures from each of two noises, a prompt each.")] = 64,
    seed: Seed = 0,
    guidance: Annotated[
        float, typer.Option(help="The teacher's CFG; default: what the LoRA was distilled under, or 7.5.")
    ] = None,
    features: Annotated[
        list[str],
        place_option(help="latents, pixels, inception, or a CLIP's folder. Repeat for several; default: the named."),
    ] = None,
    clip: Annotated[Path, typer.Option(help="Folder of a CLIP model, for the CLIP score.")] = None,
    resolution: Resolution = None,
    as_json: Json = False,
) -> None:
    """Compare LoRAs with the teacher and the untrained base at as many evaluations; write a report.

    report.json, report.md, plots and a grid: paired error, distances to the teacher at 40 steps, precision and recall,
    diversity, consistency across step counts, CFG sweep, negative prompts, each with its confidence interval.

    Example: pcm evaluate --base tiny-emoji --lora out/demo/lora.safetensors --steps 1,2,4,8 --out out/evaluate
    """
    check_files(*lora)

    from ..evaluation.report import evaluate as compare

    def say(line: str) -> None:
        typer.echo(line, err=True)

    details = compare(
        base.path,
        lora,
        out,
        steps=_steps(steps),
        prompts=prompts,
        pictures=pictures,
        seed=seed,
        say=say,
        dtype=base.dtype,
        family=base.family,
        tokenizer=base.tokenizer,
        config=base.config,
        parts=base.parts,
        t5=base.t5,
        merged=base.base_lora or (),
        resolution=resolution,
        clip=clip,
        features=features,
        guidance=guidance,
    )
    for line in [*details["warnings"], *(f"Left out. {line}" for line in details["left_out"])]:
        say(line)
    answer(details, as_json, f"{out / 'report.md'}: {len(details['rows'])} settings, {pictures} pictures of each")


@verb(app, LORA_FILES)
def inspect(file: LoraFile, as_json: Json = False) -> None:
    """Print what a LoRA's header says: recipe, family, rank, alpha, keys, hashes, metadata."""
    from ..lora.describe import describe, describe_text

    details = describe(file)
    answer(details, as_json, describe_text(details))


@verb(app, LORA_FILES)
def check(
    file: LoraFile,
    base: BasePath,
    family: Family = None,
    tokenizer: Tokenizer = None,
    config: ConfigsFolder = None,
    parts: PartsFolder = None,
    as_json: Json = False,
) -> None:
    """Load a LoRA through diffusers and by hand, in fp32, and compare: unmatched keys, greatest output difference.

    Exits with 1 when a key is unmatched or the outputs differ.
    """
    check_files(file)

    from ..lora.check import check_parity
    from ..lora.install import load_for_check

    loaded = load_for_check(base, family=family, tokenizer=tokenizer, config=config, parts=parts)
    details = check_parity(file, loaded)
    answer(details, as_json, details["text"])
    if not details["passed"]:
        raise typer.Exit(1)


for function in share.VERBS:
    verb(app, LORA_FILES)(function)


for function in (doctor.doctor, bench.bench, bench.bench_gpu, bench.bench_data):
    verb(app, MACHINE)(function)


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--steps is {text!r}; write numbers with commas between them, such as 1,2,4,8.") from None


def main() -> None:
    """Run a verb; errors a user can mend are one message without a traceback (PCM_DEBUG=1 shows it).

    With --json a message is an object on stdout, too. What the terminal's encoding lacks is printed as "?".
    """
    as_json = "--json" in sys.argv[1:]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    debug = bool(os.environ.get("PCM_DEBUG"))
    try:
        with contextlib.suppress(BrokenPipeError):
            # the name is for `python -m` too: the shell's completion is of it
            sys.exit(app(prog_name="pcm", standalone_mode=not as_json) or 0)
    except USAGE_ERROR as error:  # of the words themselves, which typer shows by itself unless it must be JSON
        sys.exit(_fail(error.format_message(), error.exit_code, as_json))
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if debug:
            raise
        sys.exit(_fail(str(error), 2, as_json))
    except (RuntimeError, OSError, MemoryError) as error:
        if debug:
            raise
        sys.exit(_fail(_advice(error), 1, as_json))


def _fail(message: str, code: int, as_json: bool) -> int:
    print(f"Error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message}))
    return code


def _advice(error: Exception) -> str:
    """The message; of a run that ran out of memory it already names what would save how much."""
    from ..system.machine import out_of_memory

    if out_of_memory(error):
        return (
            f"{str(error) or 'Out of memory.'}\n"
            "Try a smaller resolution, --dtype bf16, or end what else holds the device's memory."
        )
    return str(error)


if __name__ == "__main__":
    main()
