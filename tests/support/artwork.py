"""The pack's icon and banner for the registry: `python -m support.artwork` draws them into nodes/web.

A probability flow from noise (left) to two kinds of pictures (right), and one trajectory of it cut into four phases and
walked in four jumps from edge to edge. The flow is computed, not drawn by hand.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parents[2] / "nodes" / "web"
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


def picture(s: float, side: int) -> np.ndarray:
    """Hills under an evening sun, (side, side, 3), with the noise of level s."""
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    image = np.array([0.98, 0.62, 0.42]) * y[..., None] + np.array([0.36, 0.30, 0.62]) * (1 - y[..., None])
    image[(x - 0.62) ** 2 + (y - 0.42) ** 2 < 0.15**2] = (1.0, 0.86, 0.48)
    image[y > 0.66 + 0.10 * np.sin(5.5 * x + 2.4)] = (0.23, 0.36, 0.46)
    image[y > 0.80 + 0.08 * np.sin(4.2 * x + 0.2)] = (0.12, 0.22, 0.33)
    noise = np.random.default_rng(0).normal(0.5, 0.28, image.shape)
    return np.clip((1 - s) * image + s * noise, 0, 1)


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
    left, width, side = 0.50, 0.44, 82
    lines = inset(figure, left, 0.36, width, 0.56, -2.0, 2.0)
    edges = draw_flow(lines, (-1, 1), np.linspace(-2, 2, 13), 0.42, 9, 0.85)
    for s, edge in zip(np.linspace(1, 0, PHASES + 1), edges, strict=True):
        middle = 1260 * (left + width * edge[0])
        box = (middle - side / 2, middle + side / 2, 60, 60 + side)
        axes.imshow(picture(s, side), extent=box, aspect="auto", zorder=2)
    axes.set(xlim=(0, 1260), ylim=(0, 540))
    axes.text(70, 330, "Phased\nConsistency", color=WHITE, fontsize=52, fontweight="bold", va="center", linespacing=1.1)
    axes.text(73, 196, "Few-step images in ComfyUI,", color=GREY, fontsize=21, va="center")
    axes.text(73, 156, "from LoRAs you find or train", color=GREY, fontsize=21, va="center")
    return figure


if __name__ == "__main__":
    matplotlib.use("Agg")
    for name, draw in (("icon", icon), ("banner", banner)):
        draw().savefig(FOLDER / f"{name}.png", transparent=True, metadata={"Software": None})
