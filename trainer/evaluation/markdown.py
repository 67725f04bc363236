"""report.md: the report for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...samplers.phases import count_steps
from .distances import SCALE
from .intervals import Figure

RowFacts = dict[str, Any]  # one of a report's rows
# Figures of a space, and those that not every report has: key in a row, head of the column, format, factor.
SPACE = (
    ("kernel", f"kernel x {SCALE}", ".3g", SCALE),
    ("frechet", "Frechet", ".4g", 1),
    ("precision", "precision", ".2f", 1),
    ("recall", "recall", ".2f", 1),
    ("diversity_share", "diversity", ".0%", 1),
)
FACTS = (("prompt_followed", "prompt followed", ".0%", 1), ("clip_score", "CLIP score", ".2f", 1))
PICTURES = {
    "quality.png": "Every figure over the evaluations of the network that a picture costs",
    "consistency.png": "How far pictures with fewer steps are from those with more",
    "guidance.png": "CFG and negative prompts",
    "grid.png": "The same prompts and noises",
}


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [_head(report), *_results(report), *_learnt(report), *_consistency(report), *_guidance(report)]
    parts += _listed("Left out", report["left_out"])
    return "\n\n".join(parts) + "\n"


def _head(report: dict[str, Any]) -> str:
    """The title, how the pictures were made, and what the reader must know."""
    reference, prompts = report["reference"], report["prompts"]
    facts = [
        f"{report['pictures']} pictures of {report['resolution']} x {report['resolution']} from each of "
        f"{report['noises']} noises, seed {report['seed']}, from {prompts['different']} prompts: {prompts['source']}.",
        f"Reference: the teacher with DDIM, {count_steps(reference['steps'])}, CFG {reference['guidance']:g}.",
        "In brackets the 95 % confidence interval: what other prompts and other noise would have given.",
        *(f"{lora['name']}: {lora['use'] or 'no recipe'}" for lora in report["loras"]),
    ]
    notes = [*report["warnings"], *report["too_few"]]
    head = f"# {', '.join(lora['name'] for lora in report['loras'])} on {report['base']}\n\n" + _bullets(facts)
    return f"{head}\n\n**Note**\n\n{_bullets(notes)}" if notes else head


def _results(report: dict[str, Any]) -> Iterable[str]:
    """Every setting against the reference, which comes first; the figures of each space in a table."""
    rows = sorted(report["rows"], key=lambda r: (r != report["rows"][0], r["evaluations"]))
    facts = [fact for fact in FACTS if fact[0] in rows[0]]

    yield "## Against the reference, at the same cost"
    yield _rows_table(rows, [("paired_error", "paired error", ".3f", 1), *facts], lambda row: row)
    for name in report["features"]:
        yield f"### Distribution, {name}"
        yield _rows_table(rows, SPACE, lambda row, name=name: row["spaces"][name])
    yield _picture("quality.png")
    yield _picture("grid.png")
    yield _bullets(_explained(report["features"], report["pictures"] * report["noises"]))


def _rows_table(rows: list[RowFacts], columns: Iterable[tuple], figures: Callable[[RowFacts], RowFacts]) -> str:
    """A line for each row, with these of its figures; the reference is the first."""
    lines = []
    for row in rows:
        who = f"*{row['who']}: the reference*" if row is rows[0] else row["who"]
        cells = [_cell(figures(row).get(key), form, factor) for key, _, form, factor in columns]
        lines.append([who, row["steps"], f"{row['guidance']:g}", row["evaluations"], *cells])
    return markdown_table(["", "steps", "CFG", "evaluations", *(head for _, head, *_ in columns)], lines)


def _cell(figure: dict[str, float] | None, form: str, factor: float = 1) -> str:
    """A figure with its interval; nothing where there is none."""
    return "" if figure is None else format(Figure(**figure) * factor, form)


def _explained(spaces: dict[str, int], pictures: int) -> list[str]:
    """The meaning of the columns, and what to mind."""
    sizes = ", ".join(f"{name} {size}" for name, size in spaces.items())
    notes = [
        "*evaluations*: of the network, for one picture. CFG other than 1 costs two a step, each solver takes one.",
        "*paired error*: |made - reference| / |reference| over a whole latent, from the same noise, averaged; 0 is the "
        "same picture. All other figures are against the reference's pictures from other noise, so *the reference* "
        "itself, measured like the others, is the floor: no sampler can be expected to do better.",
        "*untrained*: the base drawn as this LoRA draws, with its adapter off: what a LoRA that had learnt nothing "
        "would give.",
        f"*kernel*: squared kernel distance (KID's: cubic kernel, unbiased), times {SCALE}. Its floor is 0 on average, "
        "so it may come below 0, and nothing is to be subtracted.",
        "*Frechet*: Frechet distance of the sets' Gaussians, squared, which on Inception's features is FID. It is "
        "biased: two equal sets of this size get the reference's value. Compare it at one number of pictures only.",
        "*precision*: the share of the pictures that lie among the reference's; *recall*: the share of the reference's "
        "that lie among these (by nearest neighbours). Compare with the reference's own. Low recall: something is no "
        "longer drawn.",
        "*diversity*: how much two pictures of one prompt differ (root mean square), as a share of the reference's. "
        "Low shares mean that one picture is drawn whatever the noise.",
        f"Dimensions: {sizes}.",
        "DDIM and DPM-Solver++(2M) step over trailing levels. DDIM and Euler are the same map, so Euler steps over the "
        "levels that it is used with, spaced evenly from the noisiest to the first.",
    ]
    if larger := [name for name, size in spaces.items() if size >= pictures]:
        notes.append(
            f"{', '.join(larger)}: as many dimensions as pictures or more, so the covariances are singular, and most "
            "of a small Frechet distance is bias."
        )
    return notes if spaces else notes[:3]


def _learnt(report: dict[str, Any]) -> Iterable[str]:
    """By how much each LoRA is nearer than the base without it."""
    if not report["learnt"]:
        return
    yield "## What was learnt"
    yield (
        f"By how much the kernel distance (x {SCALE}) is below that of the untrained base at as many evaluations. "
        "Noise that both share is not in this interval, so it is the one to tell them apart by."
    )
    lines = [
        [entry["who"], entry["steps"], entry["space"], entry["untrained"], _cell(entry["gain"], ".3g", SCALE)]
        for entry in report["learnt"]
    ]
    yield markdown_table(["", "steps", "features", "against", "nearer by"], lines)


def _consistency(report: dict[str, Any]) -> Iterable[str]:
    """A table for each who with several numbers of steps."""
    if not report["consistency"]:
        return
    yield "## Consistency across step counts"
    yield "Paired error of the pictures with fewer steps against those with more, from the same noise."
    for who, errors in report["consistency"].items():
        more = list(dict.fromkeys(m for row in errors.values() for m in row))
        lines = [[n, *(_cell(row.get(m), ".3f") for m in more)] for n, row in errors.items()]
        yield markdown_table([who, *(f"to {count_steps(int(m))}" for m in more)], lines)
    yield _picture("consistency.png")


def _guidance(report: dict[str, Any]) -> Iterable[str]:
    """The CFG sweep, and negative prompts where they were tried."""
    rows, number = report["guidance"], report["guidance_pictures"]
    yield "## CFG and negative prompts"
    yield (
        f"The first {number} pictures, at each LoRA's own number of steps. Paired error against the reference at the "
        f"same CFG, and against the reference at CFG {report['reference']['guidance']:g}."
    )
    scales = sorted({point["guidance"] for row in rows for point in row["sweep"]})
    lines = []
    for row in rows:
        points = {point["guidance"]: point for point in row["sweep"]}
        for key, against in (("error_same_cfg", "the same CFG"), ("error", f"CFG {report['reference']['guidance']:g}")):
            errors = [_cell(points.get(g, {}).get(key), ".3f") for g in scales]
            lines.append([row["name"], row["steps"], against, *errors])
    yield markdown_table(["", "steps", "against", *(f"CFG {g:g}" for g in scales)], lines)
    if negatives := [(row["name"], row["negative_prompt"]) for row in rows if "negative_prompt" in row]:
        yield (
            "With the next picture's prompt as the negative: how far that moves a picture (*change*, as a paired "
            "error), how far it moves the teacher's at the same CFG, and the cosine of the two moves (*agreement*)."
        )
        heads = ["", "CFG", "change", "teacher's change", "agreement"]
        keys = ("change", "change_of_teacher", "agreement")
        lines = [[name, f"{n['guidance']:g}", *(_cell(n[key], ".3f") for key in keys)] for name, n in negatives]
        yield markdown_table(heads, lines)
    yield _picture("guidance.png")


def _listed(title: str, lines: list[str]) -> list[str]:
    """A heading, if there is a title, and the lines as bullets; nothing where there are no lines."""
    return [*([f"## {title}"] if title else []), _bullets(lines)] if lines else []


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _picture(name: str) -> str:
    return f"![{PICTURES[name]}]({name})"


def markdown_table(heads: list, rows: list[list]) -> str:
    """A table under its heads, a line for each row."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
