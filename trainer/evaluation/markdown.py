"""report.md: the report for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...samplers.phases import count_steps

# Figures that not every report has: key in a row, head of the column, format.
FACTS = (("clip_score", "CLIP score", ".2f"), ("prompt_followed", "prompt followed", ".0%"))
PICTURES = {
    "quality.png": "Every figure over the evaluations of the network that a picture costs",
    "consistency.png": "How far pictures with fewer steps are from those with more",
    "guidance.png": "CFG and negative prompts",
    "grid.png": "The same prompts and noises",
}


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [_head(report), *_results(report), *_diversity(report), *_consistency(report), *_guidance(report)]
    parts += _listed("Left out", report["left_out"])
    return "\n\n".join(parts) + "\n"


def _head(report: dict[str, Any]) -> str:
    """The title, how the pictures were made, and what the reader must know."""
    reference, prompts = report["reference"], report["prompts"]
    facts = [
        f"{report['pictures']} pictures of {report['resolution']} x {report['resolution']}, seed {report['seed']}, "
        f"from {prompts['different']} prompts: {prompts['source']}.",
        f"Reference: the teacher with DDIM, {count_steps(reference['steps'])}, CFG {reference['guidance']:g}, from the "
        f"same noise.",
        *(f"{lora['name']}: {lora['use'] or 'no recipe'}" for lora in report["loras"]),
    ]
    notes = "\n\n".join(_listed("", report["warnings"]))
    head = f"# {', '.join(lora['name'] for lora in report['loras'])} on {report['base']}\n\n" + _bullets(facts)
    return f"{head}\n\n**Note**\n\n{notes}" if report["warnings"] else head


def _results(report: dict[str, Any]) -> Iterable[str]:
    """Every setting against the reference, which comes first."""
    spaces, rows = report["features"], sorted(report["rows"], key=lambda r: (r != report["rows"][0], r["evaluations"]))
    facts = [fact for fact in FACTS if fact[0] in rows[0]]
    heads = ["", "steps", "CFG", "evaluations", "paired error"]
    heads += [f"{name}: {kind}" for name in spaces for kind in ("sliced W.", "Frechet")] + [h for _, h, _ in facts]

    lines = [
        [row["who"], row["steps"], f"{row['guidance']:g}", row["evaluations"], f"{row['paired_error']:.3f}"]
        + _distances(row["distances"])
        + [format(row[key], form) for key, _, form in facts]
        for row in rows
    ]
    lines.append(["*teacher, other noise*", *("",) * 4, *_distances(report["other_noise"]), *("",) * len(facts)])

    yield "## Against the reference, at the same cost"
    yield _table(heads, lines)
    yield _picture("quality.png")
    yield _picture("grid.png")
    yield _bullets(_explained(spaces, report["pictures"]))


def _explained(spaces: dict[str, int], pictures: int) -> list[str]:
    """The meaning of the columns, and what to mind."""
    sizes = ", ".join(f"{name} {size}" for name, size in spaces.items())
    notes = [
        "*evaluations*: of the network, for one picture. CFG other than 1 costs two a step, each solver takes one.",
        "*paired error*: |made - reference| / |reference| over a whole latent, averaged; 0 is the same picture.",
        "*sliced W.*: sliced 2-Wasserstein distance of the two sets. *Frechet*: of their Gaussians, squared, which on "
        f"Inception's features is FID. Dimensions: {sizes}.",
        "*teacher, other noise*: the reference against itself with another seed, which is what two sets of this size "
        "and equal quality differ by. Settings that follow the reference picture by picture come below it.",
        "DDIM and DPM-Solver++(2M) step over trailing levels. DDIM and Euler are the same map, so Euler steps over the "
        "levels that it is used with, spaced evenly from the noisiest to the first.",
    ]
    if larger := [name for name, size in spaces.items() if size >= pictures]:
        notes.append(
            f"{', '.join(larger)}: as many dimensions as pictures or more, so the covariances are singular. The "
            "Frechet distance is exact for these sets, but larger sets would give less: compare it at one number only."
        )
    return notes


def _distances(distances: dict[str, dict[str, float]]) -> list[str]:
    """The cells of both distances in each space."""
    values = [d[kind] for d in distances.values() for kind in ("sliced_wasserstein", "frechet")]
    return [f"{value:.4g}" if value > 1e-9 else "0" for value in values]


def _diversity(report: dict[str, Any]) -> Iterable[str]:
    """How much the pictures of one prompt differ, for the settings that were made twice."""
    rows, spaces = [row for row in report["rows"] if "diversity" in row], report["features"]
    teacher = rows[0]["diversity"]
    yield "## Seed diversity"
    yield (
        "Root mean square difference of two pictures of the same prompt from different noise, and its share of the "
        "reference's. Low shares mean that the LoRA draws one picture whatever the seed."
    )
    heads = ["", "steps", *(f"{name}{kind}" for name in spaces for kind in ("", ": share"))]
    lines = [[row["who"], row["steps"]] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        for name, value in row["diversity"].items():
            line += [f"{value:.4g}", f"{value / teacher[name]:.0%}" if teacher[name] else ""]
    yield _table(heads, lines)


def _consistency(report: dict[str, Any]) -> Iterable[str]:
    """A table for each who with several numbers of steps."""
    if not report["consistency"]:
        return
    yield "## Consistency across step counts"
    yield "Paired error of the pictures with fewer steps against those with more, from the same noise."
    for who, errors in report["consistency"].items():
        more = list(dict.fromkeys(m for row in errors.values() for m in row))
        lines = [[n, *(f"{row[m]:.3f}" if m in row else "" for m in more)] for n, row in errors.items()]
        yield _table([who, *(f"to {count_steps(int(m))}" for m in more)], lines)
    yield _picture("consistency.png")


def _guidance(report: dict[str, Any]) -> Iterable[str]:
    """The CFG sweep, and negative prompts where they were tried."""
    rows, number = report["guidance"], report["guidance_pictures"]
    yield "## CFG and negative prompts"
    yield (
        f"The first {number} pictures, at each LoRA's own number of steps. Paired error against the reference at the "
        f"same CFG, and in brackets against the reference at CFG {report['reference']['guidance']:g}."
    )
    scales = sorted({point["guidance"] for row in rows for point in row["sweep"]})
    lines = []
    for row in rows:
        errors = {p["guidance"]: f"{p['error_same_cfg']:.3f} ({p['error']:.3f})" for p in row["sweep"]}
        lines.append([row["name"], row["steps"], *(errors.get(g, "") for g in scales)])
    yield _table(["", "steps", *(f"CFG {g:g}" for g in scales)], lines)
    if negatives := [(row["name"], row["negative_prompt"]) for row in rows if "negative_prompt" in row]:
        yield (
            "With the next picture's prompt as the negative: how far that moves a picture (*change*, as a paired "
            "error), how far it moves the teacher's at the same CFG, and the cosine of the two moves (*agreement*)."
        )
        heads = ["", "CFG", "change", "teacher's change", "agreement"]
        keys = ("change", "change_of_teacher", "agreement")
        yield _table(heads, [[name, f"{n['guidance']:g}", *(f"{n[k]:.3f}" for k in keys)] for name, n in negatives])
    yield _picture("guidance.png")


def _listed(title: str, lines: list[str]) -> list[str]:
    """A heading, if there is a title, and the lines as bullets; nothing where there are no lines."""
    return [*([f"## {title}"] if title else []), _bullets(lines)] if lines else []


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _picture(name: str) -> str:
    return f"![{PICTURES[name]}]({name})"


def _table(heads: list, rows: list[list]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
