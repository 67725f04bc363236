"""Every zero-shot edit on a tiny base, drawn, and measured against the truth and baselines (docs/measurements/).

    python -m phased_consistency.trainer.studies.editing [--lora FILE] [--out DIR] [--base tiny-sd15] [--pictures 16]
        [--edits inpaint,denoise]

The truth is drawn scenes whose captions no run has seen; they are the prompts. With --lora everything is
sampled by its recipe, and the base alone at 8 guided steps stands beside it; without, the base alone is all
there is.
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
from ..families.generate import draw as draw_latents
from ..families.generate import unit_noise
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
from .edit_tables import Chapter, Figures, Goal, tables

SIDE, SEED = 128, 0
HOLE = 28  # radius of the inpainted discs
BLOCK = 16  # side of a stroke
FRAMES, PAIRS = 7, 4  # of an interpolation, and how many of them
SHOWN = 5  # columns of pictures
GUIDANCE = 4.0  # of the base alone
NOISES = (10, 25, 50)  # in levels
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
# Settings of the editor, by what their rows are called.
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

    Without a LoRA ours is the base alone, too. settings: of ours, where they are not the LoRA's or the base's.
    """

    def __init__(self, path: str, lora: Path | None, pictures: int, **settings):
        base = load_base(path)
        self.scenes = held_out_scenes(pictures, set(read_prompts(own_prompts(path))))
        self.prompts = [s.caption for s in self.scenes]
        drawings = [torch.from_numpy(np.array(draw(s, SIDE))).permute(2, 0, 1) for s in self.scenes]
        self.truth = torch.stack(drawings) / 255
        self.condition = base.encode_prompts(self.prompts)
        self.null = base.null_condition(base.encode_prompts([""]))
        self.teacher = Editor(base, base.alone, self.null, guidance=GUIDANCE)
        self.ours = replace(self.teacher, **settings)
        if lora:  # in a second base, as the first must stay without it
            other = load_base(path)
            self.ours = Editor(other, install_whole(lora, other), self.null, **settings)

    def chapter(self, title: str, measure: Callable[..., Figures] | None = None) -> Chapter:
        """A new chapter that shows the truth first."""
        chapter = Chapter(title, self.prompts[:SHOWN], measure)
        chapter.show("truth", self.truth)
        return chapter

    def editors(self) -> dict[str, Editor]:
        """Ours and its variants, and the teacher, if it is another."""
        editors = {name: replace(self.ours, **changes) for name, changes in VARIANTS.items()}
        return editors | ({ALONE: self.teacher} if self.ours.base is not self.teacher.base else {})

    def follows(self, pictures: Tensor) -> float:
        """Share of the pictures that show the colours of their prompts."""
        return mean(follows_prompt(s.caption, p) for s, p in zip(self.scenes, pictures, strict=True))

    def edit(self, editor: Editor, operator: Operator, denoise: float = 1.0) -> Edited:
        """Edit all pictures for their prompts."""
        return editor.edit(operator, self.condition, SEED, denoise)

    def img2img(self, picture: Tensor, denoise: float) -> Tensor:
        """Pictures (B, 3, H, W) drawn anew by ours with nothing projected, neither on the way nor at the end."""
        return self.edit(self.ours, Identity(picture), denoise).image


def inpaint(g: Gallery) -> Chapter:
    """Inpaint a round hole in each picture, off its middle: ours and its variants, and other widths of its rim."""
    mask = holes(len(g.truth))
    chapter = _hole_chapter(g, "Inpaint", mask, torch.where(mask > 0, 0.5, g.truth))
    usual = Inpaint(g.truth, mask)
    for name, editor in g.editors().items():
        chapter.add(name, g.edit(editor, usual).image, usual.weight, show=name in SHOWN_ROWS)
    for grow in (0, 16):
        other = Inpaint(g.truth, mask, grow)
        chapter.add(f"ours, rim of {grow} pixels", g.edit(g.ours, other).image, other.weight, show=grow == 0)
    _by_latents(g, chapter, usual, mask, g.truth)
    return chapter


def widen(g: Gallery) -> Chapter:
    """Outpaint each picture from its middle rows: across the scenes' stripes, which end nowhere."""
    side = 28
    middle = g.truth[..., side:-side, :]
    mask = F.pad(torch.zeros_like(middle[:, :1]), (0, 0, side, side), value=1.0)
    canvas = F.pad(middle, (0, 0, side, side), value=0.5)
    chapter = _hole_chapter(g, "Outpaint", mask, canvas)
    usual = outpaint(middle, top=side, bottom=side)
    for name, editor in g.editors().items():
        if name in ("ours", "stochastic"):
            chapter.add(name, g.edit(editor, usual).image, usual.weight, show=name == "ours")
    _by_latents(g, chapter, usual, mask, canvas)
    return chapter


def _hole_chapter(g: Gallery, title: str, mask: Tensor, canvas: Tensor) -> Chapter:
    """A chapter on pictures with a hole. mask: (B, 1, H, W), 1 is in it. canvas: the pictures with the hole grey.

    Its rows are measured by where the edit drew, (B, 1, H, W): more than the mask where there is a rim.
    """

    def measure(pictures: Tensor, region: Tensor) -> Figures:
        return {
            "PSNR of what is known": psnr(pictures, g.truth, region == 0),
            "seam at the mask": seam_ratio(pictures, mask),
            "seam where drawing ends": seam_ratio(pictures, region),
            "PSNR of the hole": psnr(pictures, g.truth, mask),
            "follows": g.follows(pictures),
        }

    chapter = g.chapter(title, measure)
    chapter.show("given", canvas)
    return chapter


def _by_latents(g: Gallery, chapter: Chapter, usual: Inpaint, mask: Tensor, source: Tensor) -> None:
    """Add rows without the VAE in the loop, ours and the host's way with the same LoRA, levels and noise; and goals.

    source: (B, 3, H, W) the pictures that the host encodes, with the mask beside them.
    """
    ended = g.edit(replace(g.ours, projection="none"), usual)
    chapter.add("ours in latents alone", g.edit(replace(g.ours, projection="latent"), usual).image, usual.weight)
    chapter.add("projected at the end alone", ended.image, usual.weight, show=False)

    def host(picture: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        """The host's pictures, and where they were drawn: in whole latent cells."""
        known = g.ours.codec.encode(picture)
        cells = cells_of(hole, known)
        latents = latent_mask(
            g.ours.base, g.condition, g.null, known, cells, ended.plan.ticks, **g.ours.settings(), seed=SEED
        )
        return g.ours.codec.decode(latents), _enlarged((cells > 0).float(), CELL)

    pictures, region = host(source, mask)
    chapter.add("SetLatentNoiseMask", pictures, region)
    chapter.add("the same, pasted", torch.where(mask > 0, pictures, g.truth), mask)
    pictures, region = host(*greyed(source, mask))
    chapter.add("VAEEncodeForInpaint", pictures, region)
    chapter.add("truth", g.truth, usual.weight, show=False)
    through_vae = usual.finish(g.ours.codec.decode(g.ours.codec.encode(g.truth)))
    chapter.add("truth through the VAE", through_vae, usual.weight)

    ours, perfect = chapter.rows["ours"], chapter.rows["truth through the VAE"]
    chapter.goals.append(Goal("PSNR of what is known, dB", ours["PSNR of what is known"], least=50))
    chapter.goals.append(Goal("seam at the mask", ours["seam at the mask"], 0.8, 1.3))
    for where in ("seam at the mask", "seam where drawing ends"):
        chapter.goals.append(Goal(f"{where}, over a perfect drawing's", ours[where] / perfect[where], 0.8, 1.3))


def colorize(g: Gallery) -> Chapter:
    """Colorize grey pictures: ours and its variants, beside img2img at several strengths."""
    grey = as_saved(luminance(g.truth))

    def measure(pictures: Tensor) -> Figures:
        return {
            "luminance error": luminance_error(pictures, grey),
            "chroma": chroma(pictures),
            "colourfulness": colourfulness(pictures),
            "PSNR": psnr(pictures, g.truth),
            "follows": g.follows(pictures),
        }

    chapter = g.chapter("Colorize", measure)
    chapter.add("grey", grey.expand(-1, 3, -1, -1))
    for name, editor in g.editors().items():
        chapter.add(name, g.edit(editor, Colorize(grey)).image, show=name in SHOWN_ROWS)
    ended = replace(g.ours, projection="none")
    chapter.add("projected at the end alone", g.edit(ended, Colorize(grey)).image)
    for strength in STRENGTHS[1:]:
        chapter.add(f"img2img, strength {strength:g}", g.img2img(grey, strength), show=strength < 1)
    chapter.add("truth", g.truth, show=False)

    ours = chapter.rows["ours"]
    chapter.goals += [
        Goal("mean luminance error, levels", ours["luminance error"], most=0.5),
        Goal("chroma over the truth's", ours["chroma"] / chapter.rows["truth"]["chroma"], least=0.5),
    ]
    return chapter


def upscale(g: Gallery, factor: int) -> Chapter:
    """Enlarge small pictures, the means of blocks of factor x factor pixels, beside bicubic and img2img."""
    low = as_saved(F.avg_pool2d(g.truth, factor))

    def measure(pictures: Tensor) -> Figures:
        return {
            "pooled error": pooled_error(pictures, low),
            "PSNR": psnr(pictures, g.truth),
            "sharpness": sharpness(pictures),
            "follows": g.follows(pictures),
        }

    chapter = g.chapter(f"Super-resolution x{factor}", measure)
    operator = SuperResolution(low, factor)
    chapter.show(f"given, {SIDE // factor} pixels", _enlarged(low, factor))
    bicubic = F.interpolate(low, scale_factor=float(factor), mode="bicubic").clamp(0, 1)
    editors = g.editors() if factor == 4 else {"ours": g.ours}
    for name, editor in editors.items():
        chapter.add(name, g.edit(editor, operator).image, show=name in SHOWN_ROWS)
    for strength in STRENGTHS[:-1]:
        chapter.add(f"ours, denoise {strength:g}", g.edit(g.ours, operator, strength).image, show=strength == 0.5)
    chapter.add("bicubic", bicubic)
    chapter.add("bicubic, projected", operator.start, show=False)
    drawn_anew = {f"bicubic, img2img {s:g}": g.img2img(bicubic, s) for s in STRENGTHS[:-1]}
    for label, pictures in drawn_anew.items():
        chapter.add(label, pictures, show="0.5" in label)
    chapter.add("truth", g.truth, show=False)

    rows = chapter.rows
    best = max(rows[label]["PSNR"] for label in drawn_anew)
    chapter.goals += [
        Goal("pooled error, levels", rows["ours"]["pooled error"], most=1),
        Goal("PSNR over bicubic's, dB", rows["ours"]["PSNR"] - rows["bicubic"]["PSNR"], least=0),
        Goal("PSNR over the best img2img's, dB", rows["ours"]["PSNR"] - best, least=0),
        Goal("sharpness over bicubic's", rows["ours"]["sharpness"] / rows["bicubic"]["sharpness"], least=1),
    ]
    return chapter


def stroke(g: Gallery) -> Chapter:
    """Paint after strokes: the mean colours of blocks, so that no form is given."""
    strokes = as_saved(_enlarged(F.avg_pool2d(g.truth, BLOCK), BLOCK))

    def measure(pictures: Tensor) -> Figures:
        return {
            "PSNR of the layout": low_pass_psnr(pictures, strokes, BLOCK),
            "sharpness": sharpness(pictures),
            "follows": g.follows(pictures),
        }

    chapter = g.chapter("Stroke to image", measure)
    chapter.add("strokes", strokes)
    for mode, gamma in (("ours", None), ("stochastic", 1.0)):
        for strength in STRENGTHS:
            pictures = replace(g.ours, gamma=gamma).stroke(strokes, g.condition, SEED, strength).image
            chapter.add(f"{mode}, strength {strength:g}", pictures, show=mode == "ours")
    chapter.add("truth", g.truth, show=False)

    layouts = [chapter.rows[f"ours, strength {s:g}"]["PSNR of the layout"] for s in STRENGTHS]
    falls = [a - b for a, b in zip(layouts, layouts[1:], strict=False)]
    chapter.goals.append(Goal("PSNR of the layout, least fall with the strength, dB", min(falls), least=0))
    return chapter


def denoise(g: Gallery) -> Chapter:
    """Take white noise of known strength out of pictures, beside filters."""
    generator = torch.Generator().manual_seed(SEED)
    noisy = {n: as_saved(g.truth + n / 255 * torch.randn(g.truth.shape, generator=generator)) for n in NOISES}
    there_and_back = lambda picture: g.ours.codec.decode(g.ours.codec.encode(picture))  # noqa: E731
    chapter = g.chapter("Denoise")
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
        by_noise = {n: way(n) for n in NOISES}
        chapter.rows[label] = {f"PSNR, noise {n}": psnr(pictures, g.truth) for n, pictures in by_noise.items()}
        if label in ("noisy", "ours", "VAE there and back", "median of 5 x 5"):
            for n in NOISES[1:]:
                chapter.show(f"{label}, noise {n}", by_noise[n])

    for column, reached in chapter.rows["ours"].items():
        gain = reached - chapter.rows["noisy"][column]
        chapter.goals.append(Goal(f"{column}, over the noisy picture's, dB", gain, least=0))
    return chapter


def interpolate(g: Gallery) -> Chapter:
    """Frames between two prompts, each end with its own noise; beside them, one picture faded into the other."""
    chapter = Chapter("Interpolate", [f"{i / (FRAMES - 1):.2f}" for i in range(FRAMES)])
    ours, faded, differences = [], [], []
    for i in range(PAIRS):
        seeds = (SEED + 2 * i, SEED + 2 * i + 1)
        ends = [{k: v[j % len(v)][None] for k, v in g.condition.items()} for j in (2 * i, 2 * i + 1)]
        frames = g.ours.interpolate((SIDE, SIDE), tuple(ends), seeds, FRAMES)
        for k, end, seed in zip((0, -1), ends, seeds, strict=True):
            alone = _single(g.ours, end, seed, frames.plan.ticks)
            differences.append((frames.latents[k] - alone).abs().max().item())
        ours.append(frames.image)
        share = torch.linspace(0, 1, FRAMES).view(-1, 1, 1, 1)
        faded.append(torch.lerp(frames.image[:1], frames.image[-1:], share))
        if i < 2:
            chapter.show(f"ours {i + 1}", ours[-1])
            chapter.show(f"faded pictures {i + 1}", faded[-1])

    for label, series in (("ours", ours), ("faded pictures", faded)):
        middle = mean(sharpness(frames[1:-1]) / sharpness(frames[[0, -1]]) for frames in series)
        even = [evenness(frames) for frames in series]
        chapter.rows[label] = {
            "largest step over the mean step": mean(even),
            "sharpness of the middle over that of the ends": middle,
        }
    chapter.goals.append(Goal("largest difference of an end and the single picture", max(differences), most=0))
    return chapter


def _single(editor: Editor, condition: Condition, seed: int, ticks: tuple[int, ...]) -> Tensor:
    """The latent (C, h, w) of one prompt and seed, as `pcm sample` makes it."""
    noise = unit_noise((1, *editor.base.latent_shape(SIDE)), seed)
    latents = draw_latents(
        editor.base, editor.usual, condition, editor.null, noise, ticks, **editor.settings(), seed=seed
    )
    return latents[0]


def holes(number: int) -> Tensor:
    """(number, 1, H, W) masks of one disc each."""
    middles = torch.rand(number, 2, 1, 1, generator=torch.Generator().manual_seed(SEED)) * SIDE / 3 + SIDE / 3
    place = torch.arange(SIDE) + 0.5
    squared = (place[:, None] - middles[:, :1]).square() + (place - middles[:, 1:]).square()
    return (squared < HOLE**2).float()


def _enlarged(small: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) each pixel as a block of factor x factor."""
    return F.interpolate(small, scale_factor=float(factor))


EDITS: dict[str, Callable[[Gallery], Chapter]] = {
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

    began = process_time()
    gallery = Gallery(args.base, args.lora, args.pictures)
    args.out.mkdir(parents=True, exist_ok=True)
    chapters = {}
    with torch.no_grad():
        for name in chosen:
            chapters[name] = EDITS[name](gallery)
            grid = draw_grid(chapters[name].pictures, chapters[name].captions)
            grid.save(args.out / f"{name}.jpg", quality=88)
    seconds = process_time() - began

    report = {"base": args.base, "lora": args.lora and args.lora.name, "pictures": args.pictures, "seconds": seconds}
    report["edits"] = {name: chapter.as_dict() for name, chapter in chapters.items()}
    write_text(args.out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(args.out / "tables.md", tables(list(chapters.values())))
    print((args.out / "tables.md").read_text() + f"\n{seconds:.0f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
