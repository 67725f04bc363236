"""The edits that keep what is known of a picture: the operator of each, its inputs, and its part in sampling.

The artists' nodes (`edit_keeping`) and the composable ones (`edit_parts`) are both made of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..samplers.editing import Projected, ProjectedLatent, begin, canvas, check_latents, extended, finish
from ..samplers.operators import Colorize, Inpaint, Operator, SuperResolution, outpaint, size_text
from ..samplers.sampling import Projection
from . import inputs
from .host import warned
from .vae import ModelVAE, beside_model, check_family, decode_last, whole

NO_MASK = 64  # sides of the empty mask that core's Load Image gives for a picture without transparency


@dataclass(frozen=True)
class EditKind:
    """One edit, from which its artist's node and its operator node are made.

    node_id, title, description, aliases: as the artist's node has them.
    make: makes the operator from the values of sockets() and widgets(), by name.
    sockets, widgets: the inputs that this edit alone has.
    denoise: the strength that suits it.
    masked: whether the latent's own cells may take the place of pixels (`inputs.PROJECTIONS`).
    """

    node_id: str
    title: str
    description: str
    aliases: tuple[str, ...]
    make: Callable[..., Operator]
    sockets: Callable[[], list[io.Input]]
    widgets: Callable[[], list[io.Input]] = list
    denoise: float = 1.0
    masked: bool = False


def image_input(tooltip: str) -> io.Input:
    """The picture of an edit."""
    return io.Image.Input("image", tooltip=f"{tooltip} Of any size; grey and transparent ones too.")


def grow_input(default: int) -> io.Input:
    """Width of the rim that `operators.Inpaint` blends."""
    return io.Int.Input(
        "grow",
        default=default,
        min=0,
        max=512,
        tooltip="Width of the rim around the hole, in pixels, over which the new goes over into your picture, so that "
        "no seam shows.",
    )


def side_inputs() -> list[io.Input]:
    """Pixels to add on each side, by the names of `operators.outpaint`."""
    tooltip = "Pixels to add on this side."
    sides = ("left", "top", "right", "bottom")
    return [io.Int.Input(side, default=0, min=0, max=8192, step=8, tooltip=tooltip) for side in sides]


def make_inpaint(image: Tensor, mask: Tensor, grow: int) -> Inpaint:
    """The operator for a host IMAGE and MASK; ValueError for a mask that cannot be one of this picture."""
    if mask.ndim < 2 or not mask.numel() or not mask.isfinite().all():
        fault = "a number that is not finite" if mask.numel() and mask.ndim >= 2 else f"the shape {tuple(mask.shape)}"
        raise ValueError(f"The mask has {fault}; it must be (batch, height, width), none of them 0, from 0 to 1.")
    mask = mask.reshape(-1, *mask.shape[-2:])

    # Drawn as it is it would do nothing, on a picture that the artist meant to paint a mask on.
    if tuple(mask.shape[-2:]) == (NO_MASK, NO_MASK) != tuple(image.shape[1:3]) and not mask.any():
        raise ValueError(
            f"The mask is an empty one of {NO_MASK}x{NO_MASK} for a picture of {image.shape[2]}x{image.shape[1]}, as "
            "Load Image gives for a picture without one. Paint one: right click on Load Image, Open in MaskEditor."
        )
    return Inpaint(picture(image), mask, grow)


INPAINT = EditKind(
    node_id="PCMInpaint",
    title="PCM Inpaint",
    description="Draws anew what a mask covers. Everything else stays, pixel for pixel, but for a rim that is blended, "
    "and what is drawn agrees with it.",
    aliases=("inpaint", "fill", "remove object", "replace", "mask", "generative fill"),
    make=make_inpaint,
    sockets=lambda: [
        image_input("The picture."),
        io.Mask.Input(
            "mask", tooltip="White is drawn anew; grey is blended. Of the picture's size, one or one for each picture."
        ),
    ],
    widgets=lambda: [grow_input(8)],
    masked=True,
)
OUTPAINT = EditKind(
    node_id="PCMOutpaint",
    title="PCM Outpaint",
    description="Continues a picture beyond its sides. The picture itself stays, pixel for pixel, but for a rim that "
    "is blended.",
    aliases=("outpaint", "extend", "uncrop", "expand", "pad image", "zoom out"),
    make=lambda image, **sides: outpaint(picture(image), **sides),
    sockets=lambda: [image_input("The picture to continue.")],
    widgets=lambda: [*side_inputs(), grow_input(24)],
    masked=True,
)
COLORIZE = EditKind(
    node_id="PCMColorize",
    title="PCM Colorize",
    description="Gives a black and white picture its colours. Every pixel keeps its lightness exactly.",
    aliases=("colorize", "colourise", "recolor", "black and white", "grayscale", "old photo"),
    make=lambda image: Colorize(picture(image)),
    sockets=lambda: [image_input("The picture; of a coloured one only the lightness is used.")],
)
SUPER_RESOLUTION = EditKind(
    node_id="PCMSuperResolution",
    title="PCM Super-resolution",
    description="Makes a picture larger by a whole number and draws the detail. Scaled down again, the result is the "
    "picture it came from.",
    aliases=("super resolution", "upscale", "enlarge", "enhance", "hires fix", "sharpen"),
    make=lambda image, factor: SuperResolution(picture(image), factor),
    sockets=lambda: [image_input("The small picture.")],
    widgets=lambda: [
        io.Int.Input("factor", default=2, min=1, max=16, tooltip="How many times as wide and as high the result is.")
    ],
    denoise=0.75,
)


@dataclass(frozen=True)
class Edit:
    """The projection of x0 in an edit, before it is known which model is sampled.

    operator: what is known of the picture. vae: the host VAE to project through. every, form: see
    `editing.Projected`. projection: one of `inputs.PROJECTIONS`.
    Raises ValueError for a form or a projection that there is not, which 0.3.64 lets through.
    """

    operator: Operator
    vae: Any
    every: int = 1
    form: str = inputs.FORMS[0]
    projection: str = inputs.PROJECTIONS[0]

    def __post_init__(self):
        inputs.check("form", self.form, inputs.FORMS)
        inputs.check("projection", self.projection, inputs.PROJECTIONS)

    def on(self, guider: Any, x: Tensor) -> Projection:
        """The `project` of `sample_phased` for a run of a guider, from x (B, C, h, w) on: a `ProjectionMaker`.

        Raises ValueError for latents that are not of the operator's
        pictures, and for a VAE of another family.
        """
        check_latents(self.operator, x)
        check_family(self.vae, guider.model_patcher)
        codec = ModelVAE(whole(self.vae), guider.inner_model)  # tiles would draw their seams into every step
        if self.projection == "latent":  # the VAE runs once, before the first step
            return ProjectedLatent.of(self.operator, begin(self.operator, codec).to(x))
        project = Projected(self.operator, codec, self.every, self.form == "residual")
        return beside_model(project, guider, self.vae, x.shape)


def picture(image: Tensor) -> Tensor:
    """A host IMAGE (B, H, W, C) as operators take pictures, (B, C, H, W). Raises ValueError for another shape."""
    if image.ndim != 4:
        raise ValueError(f"A picture must be (batch, height, width, channels); got {tuple(image.shape)}.")
    return image.movedim(-1, 1)


def image_of(pixels: Tensor) -> Tensor:
    """A picture (B, C, H, W) as a host IMAGE (B, H, W, C)."""
    return pixels.movedim(1, -1)


def start_image(operator: Operator) -> Tensor:
    """Where an edit starts, as an IMAGE of a size that the VAE and the model can work on."""
    return image_of(extended(operator.start, canvas(operator.size)))


def finished(operator: Operator, vae: Any, latents: Tensor, last_decode: str) -> tuple[Tensor, list[str]]:
    """The result of an edit as an IMAGE, and a sentence where the VAE had to go over to tiles.

    latents: as the host stores them. last_decode: one of `inputs.LAST_DECODES`. Raises ValueError for latents
    that are not of the operator's pictures.
    """
    check_latents(operator, latents)
    image, notes = decode_last(vae, last_decode, lambda codec: finish(operator, codec, latents))
    return image_of(image), notes


def remarks(operator: Operator) -> list[str]:
    """Facts of an edit that are worth knowing before it runs, in sentences for its node."""
    lines = []
    if isinstance(operator, Inpaint):
        if not operator.hole.any():
            lines += warned(["The mask is empty: nothing is drawn."])
        elif operator.hole.all():
            lines += warned(["The mask covers everything: nothing is kept."])
    height, width = canvas(operator.size)
    if (height, width) != operator.size:
        lines.append(f"{size_text(operator.start)} is worked on as {width}x{height}, then cut.")
    if operator.alpha is not None:
        lines.append("The transparency is kept.")
    return lines
