"""The composable form of the edits: an operator, a sampler that keeps to it, and the last decode.

    PCM Inpaint Operator -> VAE Encode -> SamplerCustomAdvanced with PCM Edit Sampler -> PCM Edit Decode

gives what PCM Inpaint gives, with room for guiders, ControlNets, masks and other samplers' nodes in between.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..samplers import Recipe
from ..samplers.operators import Operator
from . import inputs
from .edit_kinds import COLORIZE, INPAINT, OUTPAINT, SUPER_RESOLUTION, Edit, EditKind, finished, remarks, start_image
from .host import menu_of, show, speaking, supported
from .sampling import gamma_of, sampler

OperatorType = io.Custom("PCM_OPERATOR")


class OperatorNode(io.ComfyNode):
    """The operator node of an `EditKind`: what is known of the picture, and the picture to start from."""

    KIND: EditKind

    @classmethod
    def define_schema(cls) -> io.Schema:
        kind = cls.KIND
        return speaking(
            node_id=f"{kind.node_id}Operator",
            display_name=f"{kind.title} Operator",
            category=menu_of("KSamplerSelect"),
            description=f"The parts of {kind.title}, for core custom sampling: what is known of the picture, and where "
            "to start.",
            search_aliases=["pcm", "phased consistency", "edit", "operator", *kind.aliases],
            inputs=[*kind.sockets(), *kind.widgets()],
            outputs=[
                OperatorType.Output(display_name="operator", tooltip="For PCM Edit Sampler and PCM Edit Decode."),
                io.Image.Output(
                    display_name="start",
                    tooltip="Where the edit starts, on a canvas that the model can work on: for VAE Encode.",
                ),
            ],
        )

    @classmethod
    def execute(cls, **kind_inputs: Any) -> io.NodeOutput:
        operator = cls.KIND.make(**kind_inputs)
        return io.NodeOutput(operator, start_image(operator), ui=show(cls, remarks(operator)))


class PCMInpaintOperator(OperatorNode):
    """PCM Inpaint Operator: all outside a mask is known."""

    KIND = INPAINT


class PCMOutpaintOperator(OperatorNode):
    """PCM Outpaint Operator: the middle of a larger picture is known."""

    KIND = OUTPAINT


class PCMColorizeOperator(OperatorNode):
    """PCM Colorize Operator: the lightness is known."""

    KIND = COLORIZE


class PCMSuperResolutionOperator(OperatorNode):
    """PCM Super-resolution Operator: the means of blocks of pixels are known."""

    KIND = SUPER_RESOLUTION


class PCMEditSampler(io.ComfyNode):
    """PCM Edit Sampler: phase jumps that keep to an operator, as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="PCMEditSampler",
            display_name="PCM Edit Sampler",
            category=menu_of("KSamplerSelect"),
            description="PCM Sampler for editing: every step is made to agree with what the operator knows of the "
            "picture. For core custom sampling.",
            search_aliases=["pcm", "phased consistency", "edit", "inpaint", "outpaint", "colorize", "super resolution"],
            inputs=[
                OperatorType.Input("operator", tooltip="From one of the PCM operator nodes."),
                inputs.vae("What the steps are projected through: the checkpoint's VAE, or a fast one such as TAESD."),
                *inputs.mode(),
                *inputs.loop(),
                inputs.projection(),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        operator: Operator,
        vae,
        mode: str,
        gamma: float,
        recipe: Recipe | None = None,
        every: int = 1,
        form: str = inputs.FORMS[0],
        projection: str = inputs.PROJECTIONS[0],
    ) -> io.NodeOutput:
        gamma = gamma_of("PCM Edit Sampler", mode, gamma, recipe)
        edit = Edit(operator, vae, every, form, projection)
        return io.NodeOutput(sampler(gamma, recipe.min_alpha if recipe else 0.0, project_for=edit.on))


class PCMEditDecode(io.ComfyNode):
    """PCM Edit Decode: the result of an edit, from its latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMEditDecode",
            display_name="PCM Edit Decode",
            category=menu_of("VAEDecode"),
            description="VAE Decode for editing: the picture keeps exactly what the operator knows, its own size, and "
            "its transparency.",
            search_aliases=["pcm", "phased consistency", "edit", "decode", "composite"],
            inputs=[
                OperatorType.Input("operator", tooltip="The one that PCM Edit Sampler had."),
                inputs.vae(),
                io.Latent.Input("samples", tooltip="What was sampled."),
                inputs.last_decode(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The finished picture.")],
        )

    @classmethod
    def execute(
        cls, operator: Operator, vae, samples: dict[str, Any], last_decode: str = inputs.LAST_DECODES[0]
    ) -> io.NodeOutput:
        image, notes = finished(operator, vae, samples["samples"], last_decode)
        return io.NodeOutput(image, ui=show(cls, notes))
