"""Every zero-shot edit on a tiny base, measured against the truth and beside baselines, and drawn, for docs/editing.md.

    python -m phased_consistency.trainer.studies.editing [--lora FILE] [--out DIR] [--base tiny-sd15] [--pictures 16]
        [--edits inpaint,denoise]

The truth is drawn scenes whose captions no run has seen; they are the prompts. With --lora everything is sampled by its
recipe, and the base alone at 8 guided steps stands beside it; without, the base alone is all there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import process_time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torch import Tensor

from ...samplers.editing import CELL
from ...samplers.operators import Colorize, Identity, Inpaint, Operator, SuperResolution, luminance, outpaint
from ..data.prompts import read_prompts
from ..families import Condition, load_base
from ..families.generate import generate
from ..inference.edit import Edited, Editor
from ..lora.install import install_whole
from ..pictures import draw_grid
from ..system.files import write_text
from ..tiny.bundled import own_prompts
from ..tiny.scenes import draw, follows_prompt, held_out_scenes
from .edit_baselines import cells_of, filtered, greyed, latent_mask
from .edit_metrics import (
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
from .edit_tables import Figures, Goal, Section, tables

SIDE, HOLE, BLOCK, FRAMES, PAIRS, SHOWN, SEED = 128, 28, 16, 7, 4, 5, 0  # HOLE: its radius
GUIDANCE = 4.0  # of the base alone
NOISES = (10, 25, 50)  # in levels
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
VARIANTS = {
    "ours": {},
    "plain form": {"residual": False},
    "every 2nd step": {"every": 2},
    "stochastic": {"gamma": 1.0},
}
ALONE = "base, 8 guided steps"
SHOWN_ROWS = ("ours", ALONE)


class Gallery:
    """The truth (B, 3, H, W), its prompts, and two editors: `ours`, with the LoRA, and `teacher`, the base alone.

    how: settings of ours that are not the LoRA's, or the base's.
    """

    def __init__(self, path: str, lora: Path | None, pictures: int, **how):
        base = load_base(path)
        self.scenes = held_out_scenes(pictures, set(read_prompts(own_prompts(path))))
        self.prompts = [s.caption for s in self.scenes]
        drawn = [torch.from_numpy(np.array(draw(s, SIDE))).permute(2, 0, 1) for s in self.scenes]
        self.truth = torch.stack(drawn) / 255
        self.condition = base.encode_prompts(self.prompts)
        self.null = base.null_condition(base.encode_prompts([""]))
        self.teacher = Editor(base, base.alone, self.null, guidance=GUIDANCE)
        self.ours = replace(self.teacher, **how)
        if lora:
            other = load_base(path)
            self.ours = Editor(other, install_whole(lora, other), self.null, **how)

    def section(self, title: str, measure: Callable[..., Figures] | None = None) -> Section:
        found = Section(title, self.prompts[:SHOWN], measure)
        found.show("truth", self.truth)
        return found

    def editors(self) -> dict[str, Editor]:
        """Ours and its variants, and the teacher, if it is another."""
        found = {name: replace(self.ours, **changes) for name, changes in VARIANTS.items()}
        return found | ({ALONE: self.teacher} if self.ours.base is not self.teacher.base else {})

    def follows(self, made: Tensor) -> float:
        """Share of the pictures that show the colours of their prompts."""
        return mean(follows_prompt(s, p) for s, p in zip(self.scenes, made, strict=True))

    def edit(self, editor: Editor, operator: Operator, denoise: float = 1.0) -> Edited:
        return editor.edit(operator, self.condition, SEED, denoise)

    def img2img(self, picture: Tensor, denoise: float) -> Tensor:
        """Nothing is projected, neither on the way nor at the end."""
        return self.edit(self.ours, Identity(picture), denoise).image


def inpaint(g: Gallery) -> Section:
    """A round hole in each picture, off its middle; ours and its variants, and how wide the blended rim is."""
    mask = holes(len(g.truth))
    section = _hole_section(g, "Inpaint", mask, torch.where(mask > 0, 0.5, g.truth))
    usual = Inpaint(g.truth, mask)
    for name, editor in g.editors().items():
        section.add(name, g.edit(editor, usual).image, usual.weight, show=name in SHOWN_ROWS)
    for grow in (0, 16):
        other = Inpaint(g.truth, mask, grow)
        section.add(f"ours, rim of {grow} pixels", g.edit(g.ours, other).image, other.weight, show=grow == 0)
    _by_latents(g, section, usual, mask, g.truth)
    return section


def widen(g: Gallery) -> Section:
    """The middle rows of each picture, outpainted to the whole; across the scenes' stripes, which end nowhere."""
    side = 28
    middle = g.truth[..., side:-side, :]
    mask = F.pad(torch.zeros_like(middle[:, :1]), (0, 0, side, side), value=1.0)
    given = F.pad(middle, (0, 0, side, side), value=0.5)
    section, usual = _hole_section(g, "Outpaint", mask, given), outpaint(middle, top=side, bottom=side)
    for name, editor in g.editors().items():
        if name in ("ours", "stochastic"):
            section.add(name, g.edit(editor, usual).image, usual.weight, show=name == "ours")
    _by_latents(g, section, usual, mask, given)
    return section


def _hole_section(g: Gallery, title: str, mask: Tensor, given: Tensor) -> Section:
    def measure(made: Tensor, drawn: Tensor) -> Figures:
        return {
            "PSNR of what is known": psnr(made, g.truth, drawn == 0),
            "seam at the mask": seam_ratio(made, mask),
            "seam where drawing ends": seam_ratio(made, drawn),
            "PSNR of the hole": psnr(made, g.truth, mask),
            "follows": g.follows(made),
        }

    section = g.section(title, measure)
    section.show("given", given)
    return section


def _by_latents(g: Gallery, section: Section, usual: Inpaint, mask: Tensor, given: Tensor) -> None:
    """Rows without the VAE in the loop: ours, and the host's way with the same LoRA, levels and noise. The goals."""
    ended = g.edit(replace(g.ours, projection="none"), usual)
    section.add("ours in latents alone", g.edit(replace(g.ours, projection="latent"), usual).image, usual.weight)
    section.add("projected at the end alone", ended.image, usual.weight, show=False)

    def host(picture: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        known = g.ours.codec.encode(picture)
        how = (known, cells_of(drawn, known), ended.plan.ticks)
        latents = latent_mask(g.ours.base, g.condition, g.null, *how, **g.ours.settings(), seed=SEED)
        return g.ours.codec.decode(latents), _enlarged((how[1] > 0).float(), CELL)

    made, drawn = host(given, mask)
    section.add("SetLatentNoiseMask", made, drawn)
    section.add("the same, pasted", torch.where(mask > 0, made, g.truth), mask)
    section.add("VAEEncodeForInpaint", *host(*greyed(given, mask)))
    section.add("truth", g.truth, usual.weight, show=False)
    section.add("truth through the VAE", usual.finish(g.ours.codec.decode(g.ours.codec.encode(g.truth))), usual.weight)
    ours, perfect = section.rows["ours"], section.rows["truth through the VAE"]
    section.goals.append(Goal("PSNR of what is known, dB", ours["PSNR of what is known"], least=50))
    section.goals.append(Goal("seam at the mask", ours["seam at the mask"], 0.8, 1.3))
    for where in ("seam at the mask", "seam where drawing ends"):
        section.goals.append(Goal(f"{where}, over a perfect drawing's", ours[where] / perfect[where], 0.8, 1.3))


def colorize(g: Gallery) -> Section:
    """A grey picture."""
    grey = as_saved(luminance(g.truth))

    def measure(made: Tensor) -> Figures:
        return {
            "luminance error": luminance_error(made, grey),
            "chroma": chroma(made),
            "colourfulness": colourfulness(made),
            "PSNR": psnr(made, g.truth),
            "follows": g.follows(made),
        }

    section = g.section("Colorize", measure)
    section.add("grey", grey.expand(-1, 3, -1, -1))
    for name, editor in g.editors().items():
        section.add(name, g.edit(editor, Colorize(grey)).image, show=name in SHOWN_ROWS)
    ended = replace(g.ours, projection="none")
    section.add("projected at the end alone", g.edit(ended, Colorize(grey)).image)
    for strength in STRENGTHS[1:]:
        section.add(f"img2img, strength {strength:g}", g.img2img(grey, strength), show=strength < 1)
    section.add("truth", g.truth, show=False)
    ours = section.rows["ours"]
    section.goals += [
        Goal("mean luminance error, levels", ours["luminance error"], most=0.5),
        Goal("chroma over the truth's", ours["chroma"] / section.rows["truth"]["chroma"], least=0.5),
    ]
    return section


def upscale(g: Gallery, factor: int) -> Section:
    """A small picture, the mean of each block of factor x factor pixels."""
    low = as_saved(F.avg_pool2d(g.truth, factor))

    def measure(made: Tensor) -> Figures:
        return {
            "pooled error": pooled_error(made, low),
            "PSNR": psnr(made, g.truth),
            "sharpness": sharpness(made),
            "follows": g.follows(made),
        }

    section, operator = g.section(f"Super-resolution x{factor}", measure), SuperResolution(low, factor)
    section.show(f"given, {SIDE // factor} pixels", _enlarged(low, factor))
    bicubic = F.interpolate(low, scale_factor=float(factor), mode="bicubic").clamp(0, 1)
    editors = g.editors() if factor == 4 else {"ours": g.ours}
    for name, editor in editors.items():
        section.add(name, g.edit(editor, operator).image, show=name in SHOWN_ROWS)
    for strength in STRENGTHS[:-1]:
        section.add(f"ours, denoise {strength:g}", g.edit(g.ours, operator, strength).image, show=strength == 0.5)
    section.add("bicubic", bicubic)
    section.add("bicubic, projected", operator.start, show=False)
    drawn = {f"bicubic, img2img {s:g}": g.img2img(bicubic, s) for s in STRENGTHS[:-1]}
    for label, made in drawn.items():
        section.add(label, made, show="0.5" in label)
    section.add("truth", g.truth, show=False)
    rows = section.rows
    best = max(rows[label]["PSNR"] for label in drawn)
    section.goals += [
        Goal("pooled error, levels", rows["ours"]["pooled error"], most=1),
        Goal("PSNR over bicubic's, dB", rows["ours"]["PSNR"] - rows["bicubic"]["PSNR"], least=0),
        Goal("PSNR over the best img2img's, dB", rows["ours"]["PSNR"] - best, least=0),
        Goal("sharpness over bicubic's", rows["ours"]["sharpness"] / rows["bicubic"]["sharpness"], least=1),
    ]
    return section


def stroke(g: Gallery) -> Section:
    """Strokes of the pen: the colours of blocks, so that no form is given."""
    strokes = as_saved(_enlarged(F.avg_pool2d(g.truth, BLOCK), BLOCK))

    def measure(made: Tensor) -> Figures:
        return {
            "PSNR of the layout": low_pass_psnr(made, strokes, BLOCK),
            "sharpness": sharpness(made),
            "follows": g.follows(made),
        }

    section = g.section("Stroke to image", measure)
    section.add("strokes", strokes)
    for mode, gamma in (("ours", None), ("stochastic", 1.0)):
        for strength in STRENGTHS:
            made = replace(g.ours, gamma=gamma).stroke(strokes, g.condition, SEED, strength).image
            section.add(f"{mode}, strength {strength:g}", made, show=mode == "ours")
    section.add("truth", g.truth, show=False)
    layouts = [section.rows[f"ours, strength {s:g}"]["PSNR of the layout"] for s in STRENGTHS]
    falls = [a - b for a, b in zip(layouts, layouts[1:], strict=False)]
    section.goals.append(Goal("PSNR of the layout, least fall with the strength, dB", min(falls), least=0))
    return section


def denoise(g: Gallery) -> Section:
    """White noise of known strength, in the picture."""
    generator = torch.Generator().manual_seed(SEED)
    noisy = {n: as_saved(g.truth + n / 255 * torch.randn(g.truth.shape, generator=generator)) for n in NOISES}
    there_and_back = lambda picture: g.ours.codec.decode(g.ours.codec.encode(picture))  # noqa: E731
    section = g.section("Denoise")
    ways: dict[str, Callable[[int], Tensor]] = {
        "noisy": lambda n: noisy[n],
        "ours": lambda n: g.ours.denoise(noisy[n], g.condition, SEED, n / 255).image,
        "ours, noise estimated": lambda n: g.ours.denoise(noisy[n], g.condition, SEED).image,
        "VAE there and back": lambda n: there_and_back(noisy[n]),
        "Gaussian blur, radius 1": lambda n: filtered(noisy[n], ImageFilter.GaussianBlur(1)),
        "Gaussian blur, radius 2": lambda n: filtered(noisy[n], ImageFilter.GaussianBlur(2)),
        "median of 3 x 3": lambda n: filtered(noisy[n], ImageFilter.MedianFilter(3)),
        "median of 5 x 5": lambda n: filtered(noisy[n], ImageFilter.MedianFilter(5)),
        "truth there and back": lambda n: there_and_back(g.truth),
    }
    for label, way in ways.items():
        made = {n: way(n) for n in NOISES}
        section.rows[label] = {f"PSNR, noise {n}": psnr(m, g.truth) for n, m in made.items()}
        if label in ("noisy", "ours", "VAE there and back", "median of 5 x 5"):
            for n in NOISES[1:]:
                section.show(f"{label}, noise {n}", made[n])
    for column, reached in section.rows["ours"].items():
        gain = reached - section.rows["noisy"][column]
        section.goals.append(Goal(f"{column}, over the noisy picture's, dB", gain, least=0))
    return section


def interpolate(g: Gallery) -> Section:
    """Frames between two prompts, each with its own noise; the other way is to fade one picture into the other."""
    section = Section("Interpolate", [f"{i / (FRAMES - 1):.2f}" for i in range(FRAMES)])
    ours, faded, differences = [], [], []
    for i in range(PAIRS):
        seeds = (SEED + 2 * i, SEED + 2 * i + 1)
        ends = [{k: v[j % len(v)][None] for k, v in g.condition.items()} for j in (2 * i, 2 * i + 1)]
        made = g.ours.interpolate((SIDE, SIDE), tuple(ends), seeds, FRAMES)
        alone = [_single(g.ours, end, seed, made.plan.ticks) for end, seed in zip(ends, seeds, strict=True)]
        differences += [(made.latents[k] - single).abs().max().item() for k, single in zip((0, -1), alone, strict=True)]
        ours.append(made.image)
        share = torch.linspace(0, 1, FRAMES).view(-1, 1, 1, 1)
        faded.append(torch.lerp(made.image[:1], made.image[-1:], share))
        if i < 2:
            section.show(f"ours {i + 1}", ours[-1])
            section.show(f"faded pictures {i + 1}", faded[-1])
    for label, series in (("ours", ours), ("faded pictures", faded)):
        middle = mean(sharpness(frames[1:-1]) / sharpness(frames[[0, -1]]) for frames in series)
        even = [evenness(frames) for frames in series]
        section.rows[label] = {
            "largest step over the mean step": mean(even),
            "sharpness of the middle over that of the ends": middle,
        }
    section.goals.append(Goal("largest difference of an end and the single picture", max(differences), most=0))
    return section


def _single(editor: Editor, condition: Condition, seed: int, ticks: tuple[int, ...]) -> Tensor:
    """The latent of one prompt and seed, as `pcm sample` makes it."""
    noise = torch.randn((1, *editor.base.latent_shape(SIDE)), generator=torch.Generator().manual_seed(seed))
    how = {**editor.settings(), "min_alpha": editor.usual.min_alpha, "seed": seed}
    return generate(editor.base, condition, editor.null, noise, ticks, **how)[0]


def holes(number: int) -> Tensor:
    """(number, 1, H, W) masks of one disc each."""
    middles = torch.rand(number, 2, 1, 1, generator=torch.Generator().manual_seed(SEED)) * SIDE / 3 + SIDE / 3
    place = torch.arange(SIDE) + 0.5
    squared = (place[:, None] - middles[:, :1]).square() + (place - middles[:, 1:]).square()
    return (squared < HOLE**2).float()


def _enlarged(small: Tensor, factor: int) -> Tensor:
    return F.interpolate(small, scale_factor=float(factor))


EDITS: dict[str, Callable[[Gallery], Section]] = {
    "inpaint": inpaint,
    "outpaint": widen,
    "colorize": colorize,
    "upscale4": lambda g: upscale(g, 4),
    "upscale8": lambda g: upscale(g, 8),
    "stroke": stroke,
    "denoise": denoise,
    "interpolate": interpolate,
}


def main(argv: list[str] | None = None) -> int:
    """Make, measure and draw; write report.json, tables.md and a picture for each edit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", type=Path, help="default: the base alone")
    parser.add_argument("--out", type=Path, default=Path("out/editing"))
    parser.add_argument("--base", default="tiny-sd15")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--edits", default=",".join(EDITS), help="these alone, with commas")
    args = parser.parse_args(argv)
    chosen = args.edits.split(",")
    if unknown := sorted(set(chosen) - set(EDITS)):
        parser.error(f"no such edits: {', '.join(unknown)}; available: {', '.join(EDITS)}")
    began, gallery, sections = process_time(), Gallery(args.base, args.lora, args.pictures), {}
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name in chosen:
            sections[name] = EDITS[name](gallery)
            grid = draw_grid(sections[name].shown, sections[name].captions)
            grid.save(args.out / f"{name}.jpg", quality=88)
    seconds = process_time() - began
    report = {"base": args.base, "lora": args.lora and args.lora.name, "pictures": args.pictures, "seconds": seconds}
    report["edits"] = {name: section.as_dict() for name, section in sections.items()}
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(args.out / "tables.md", tables(list(sections.values())))
    print((args.out / "tables.md").read_text() + f"\n{seconds:.0f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
