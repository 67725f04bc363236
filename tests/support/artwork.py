"""The pack's icon and banner for the registry: `python -m support.artwork` draws them into nodes/web.

A probability flow from noise (left) to two kinds of pictures (right), and one trajectory of it cut into four phases and
walked in four jumps from edge to edge. The flow is computed, not drawn by hand. Below it the demo base's own pictures
from the same noise, by its LoRA in four steps and by the base in forty.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from phased_consistency import load_base, sample

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "nodes" / "web"
LORA = ROOT / "trainer" / "tiny" / "emoji" / "pcm_demo_emoji_4step.safetensors"
PROMPTS = [
    "a large fox face on a blue background",
    "a large panda face on a yellow background",
    "a big pear on a blue background",
    "a large pizza on a gray background",
    "a large cat face on a white background",
]
SEED = 0
DPI = 100
PHASES = 4
COLOURS = ("#9a7bff", "#45a6ff", "#2fd8b6", "#ffc84d")
NIGHT, LINE, WHITE, GREY = "#1b1f3b", "#454d78", "#ffffff", "#b4bbd6"
SPREAD = 0.12  # of each kind of pictures
POINTS = 401  # on a trajectory: a multiple of the phases, and one
Kinds = tuple[float, float]


def flow(start: np.ndarray, kinds: Kinds) -> np.ndarray:
    """Trajectories (POINTS, N) of the probability flow of x = (1 - s) data + s noise, from s = 1 to 0.

    The data is a mixture of two Gaussians around `kinds`; its velocity E[noise - data | x] has a closed form.
    """
    means = np.array(kinds)[:, None]
    levels, path = np.linspace(1, 0, POINTS), [start]
    for s, following in pairwise(levels):
        variance = ((1 - s) * SPREAD) ** 2 + s**2
        off = path[-1] - (1 - s) * means
        weight = np.exp(-(off**2) / (2 * variance))
        velocity = (s - (1 - s) * SPREAD**2) / variance * off - means
        path.append(path[-1] + (following - s) * (weight * velocity).sum(0) / weight.sum(0))
    return np.array(path)


def draw_flow(axes: Axes, kinds: Kinds, around: np.ndarray, start: float, width: float, rise: float) -> np.ndarray:
    """Draw trajectories from `around` over x from 0 to 1, and the one from `start` with its jumps.

    width, rise: of a jump's line, in points, and of its arc, in units of the axes. Returns the phases' edges,
    (PHASES + 1, 2).
    """
    turn = np.linspace(0, np.pi, POINTS)
    across, path = np.linspace(0, 1, POINTS), flow(np.array([start]), kinds)
    edges = np.stack([across, path[:, 0]], 1)[:: (POINTS - 1) // PHASES]
    axes.plot(across, flow(around, kinds), color=LINE, linewidth=width / 5, clip_on=False, zorder=1)
    axes.plot(across, path, color=WHITE, linewidth=width / 3.5, clip_on=False, zorder=2)
    for colour, (begin, end) in zip(COLOURS, pairwise(edges), strict=True):
        x, y = (begin + np.outer((1 - np.cos(turn)) / 2, end - begin) + np.outer(np.sin(turn), (0, rise))).T
        axes.plot(x, y, color=colour, linewidth=width, clip_on=False, zorder=3)
    axes.plot(*edges.T, "o", color=WHITE, markersize=width * 1.55, markeredgewidth=0, clip_on=False, zorder=4)
    return edges


def rows() -> dict[str, list[Image.Image]]:
    """The pictures of `PROMPTS`, by what is written beside them."""
    base = load_base("tiny-emoji")
    return {
        "4 steps": sample(base, PROMPTS, lora=LORA, seed=SEED),
        "40 steps": sample(base, PROMPTS, steps=40, guidance=4.0, seed=SEED),
    }


def page(width: int, height: int, radius: float) -> tuple[Figure, Axes]:
    """A figure of this many pixels, night-coloured with round corners, and axes over it in pixels."""
    figure = Figure((width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    box = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((0, 0), width, height, boxstyle=box, facecolor=NIGHT, linewidth=0))
    return figure, axes


def inset(figure: Figure, left: float, bottom: float, width: float, height: float, low: float, high: float) -> Axes:
    """Axes over a part of the figure, from x 0 to 1."""
    axes = figure.add_axes((left, bottom, width, height), xlim=(0, 1), ylim=(low, high))
    axes.axis("off")
    return axes


def icon() -> Figure:
    figure, _ = page(400, 400, 84)
    draw_flow(inset(figure, 0.125, 0.295, 0.75, 0.24, 1.2, 3.1), (-1, 3), np.array([]), 1.2, 19, 1.75)
    return figure


def banner() -> Figure:
    figure, axes = page(1260, 540, 0)
    left, width, side, gap = 650, 560, 100, 15
    lines = inset(figure, left / 1260, 0.54, width / 1260, 0.38, -2.0, 2.0)
    draw_flow(lines, (-1, 1), np.linspace(-2, 2, 13), 0.42, 8, 1.1)
    for row, (words, pictures) in enumerate(rows().items()):
        bottom = 155 - row * (side + gap)
        axes.text(left - gap, bottom + side / 2, words, color=GREY, fontsize=15, ha="right", va="center")
        for column, picture in enumerate(pictures):
            x = left + column * (side + gap)
            axes.imshow(picture, extent=(x, x + side, bottom, bottom + side), aspect="auto", zorder=2)
    axes.set(xlim=(0, 1260), ylim=(0, 540))
    axes.text(70, 360, "Phased\nConsistency", color=WHITE, fontsize=50, fontweight="bold", va="center", linespacing=1.1)
    axes.text(73, 226, "Few-step images in ComfyUI,", color=GREY, fontsize=21, va="center")
    axes.text(73, 186, "from LoRAs you find or train", color=GREY, fontsize=21, va="center")
    return figure


if __name__ == "__main__":
    matplotlib.use("Agg")
    for name, draw in (("icon", icon), ("banner", banner)):
        draw().savefig(FOLDER / f"{name}.png", transparent=True, metadata={"Software": None})
