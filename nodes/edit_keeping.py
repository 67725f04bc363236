"""The artists' editing nodes that keep what is known of a picture: one node an edit, from picture to picture."""

from __future__ import annotations

from typing import Any

import comfy.sample
from comfy_api.latest import io

from ..samplers import LevelPlan, Recipe
from ..samplers.editing import begin, canvas
from ..samplers.operators import Operator
from . import inputs
from .edit_kinds import COLORIZE, INPAINT, OUTPAINT, SUPER_RESOLUTION, Edit, EditKind, finished, remarks
from .host import menu_of, show, speaking, warned
from .inpainting import mask_faults, with_picture
from .lora_on_model import recipe_at, recipe_for
from .sampling import advice, draw
from .vae import HostVAE, check_family, check_pictures


def edit_schema(
    node_id: str,
    title: str,
    description: str,
    aliases: tuple[str, ...],
    sockets: list[io.Input],
    widgets: list[io.Input],
    advanced: list[io.Input],
) -> io.Schema:
    """The schema of an artist's editing node, around its own sockets, widgets and advanced inputs."""
    return speaking(
        node_id=node_id,
        display_name=title,
        category=menu_of("KSampler"),
        description=description,
        search_aliases=["pcm", "phased consistency", "edit", *aliases],
        inputs=[
            inputs.model(),
            inputs.recipe(),
            inputs.vae(),
            *sockets,
            *inputs.prompts(),
            inputs.seed(),
            inputs.steps(),
            inputs.cfg(),
            *widgets,
            *advanced,
            inputs.last_decode(),
        ],
        outputs=[
            io.Image.Output(display_name="image", tooltip="The finished picture."),
            io.Latent.Output(display_name="latent", tooltip="What it was decoded from, for further work on latents."),
        ],
    )


def edited(
    node: type[io.ComfyNode],
    operator: Operator,
    plan: LevelPlan,
    lines: list[str],
    *,
    model: Any,
    recipe: Recipe,
    vae: Any,
    positive: list,
    negative: list,
    seed: int,
    cfg: float,
    last_decode: str = inputs.LAST_DECODES[0],
    edit: Edit | None = None,
    amount: float = 1.0,
) -> io.NodeOutput:
    """Encode an operator's start, draw it, and decode it: the picture and its latent.

    plan: the levels. lines: what the node says. edit: makes every step agree with the operator; None where
    only the start matters. amount: of the noise to add, as a share of all of the first level's.
    Raises ValueError for a VAE of another family.
    """
    check_pictures(model)
    check_family(vae, model)  # the host would fail later, with words of tensors' sizes
    text = show(node, lines)

    samples = begin(operator, HostVAE(vae))
    noise = amount * comfy.sample.prepare_noise(samples, seed, None)
    drawn = draw(
        model,
        recipe,
        plan,
        cfg,
        with_picture(positive, model, operator, vae),
        with_picture(negative, model, operator, vae),
        {"samples": samples},
        noise,
        seed,
        project_for=edit.on if edit else None,
    )

    image, notes = finished(operator, vae, drawn, last_decode)
    if notes:
        text = show(node, [*notes, *lines])
    return io.NodeOutput(image, {"samples": drawn}, ui=text)


class EditNode(io.ComfyNode):
    """The artist's node of an `EditKind`: inputs, and the edit from picture to picture."""

    KIND: EditKind

    @classmethod
    def define_schema(cls) -> io.Schema:
        kind = cls.KIND
        start = inputs.denoise(kind.denoise, "what the edit starts from")
        advanced = [*inputs.loop(), inputs.step_vae(), *([inputs.projection()] if kind.masked else [])]
        return edit_schema(
            kind.node_id,
            kind.title,
            kind.description,
            kind.aliases,
            kind.sockets(),
            [*kind.widgets(), start],
            advanced,
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive: list,
        negative: list,
        seed: int,
        steps: int,
        cfg: float,
        denoise: float,
        every: int = 1,
        form: str = inputs.FORMS[0],
        step_vae=None,
        projection: str = inputs.PROJECTIONS[0],
        last_decode: str = inputs.LAST_DECODES[0],
        recipe: Recipe | None = None,
        **kind_inputs: Any,
    ) -> io.NodeOutput:
        operator = cls.KIND.make(**kind_inputs)
        model, recipe = recipe_at(model, recipe_for(cls, model, recipe), *canvas(operator.size))
        steps = steps or recipe.steps
        cfg = cfg or recipe.guidance
        plan = recipe.grid().plan_at_most(steps, denoise)

        # In latents the known cells are encoded once and stand in the result:
        # they are of the VAE that decodes it.
        vae_of_steps = step_vae if step_vae is not None and projection == "picture" else vae
        return edited(
            cls,
            operator,
            plan,
            [*remarks(operator), *warned(mask_faults(model)), *advice(cls, model, recipe, steps, cfg, plan, positive)],
            model=model,
            recipe=recipe,
            vae=vae,
            positive=positive,
            negative=negative,
            seed=seed,
            cfg=cfg,
            last_decode=last_decode,
            edit=Edit(operator, vae_of_steps, every, form, projection),
        )


class PCMInpaint(EditNode):
    """PCM Inpaint: what a mask covers is drawn anew."""

    KIND = INPAINT


class PCMOutpaint(EditNode):
    """PCM Outpaint: a picture is continued beyond its sides."""

    KIND = OUTPAINT


class PCMColorize(EditNode):
    """PCM Colorize: colours for a black and white picture."""

    KIND = COLORIZE


class PCMSuperResolution(EditNode):
    """PCM Super-resolution: a larger picture, with its detail drawn."""

    KIND = SUPER_RESOLUTION
