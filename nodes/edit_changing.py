"""The artists' editing nodes that keep nothing exactly: paint from strokes, take out noise, go from one to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.sample
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..samplers import Recipe, seeded_noise
from ..samplers.editing import begin, canvas, denoising, estimated_noise, slerp, slerped, stroke_plan
from ..samplers.operators import Identity
from . import inputs
from .edit_keeping import edit_schema, edited
from .edit_kinds import image_input, image_of, picture, remarks
from .host import fit_to_model, menu_of, show, speaking
from .lora_on_model import pixels_of, recipe_at, recipe_for
from .previews import preview_callback
from .sampling import advice, draw
from .vae import HostVAE, ModelVAE, check_family, decode_last

LEVELS = 255  # of 8-bit pictures


class PCMStroke(io.ComfyNode):
    """PCM Stroke to Image: a picture painted after strokes, or a variation of one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = io.Float.Input(
            "strength",
            default=0.75,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How much is painted: low keeps close to the strokes, 1 takes hardly more than their colours. It "
            "moves to the nearest phase edge of the LoRA, and the node says which strength that is.",
        )
        return edit_schema(
            "PCMStroke",
            "PCM Stroke to Image",
            "Paints a picture after rough strokes of colour, or a variation of a picture: image to image on the "
            "levels that the LoRA was trained on.",
            ("stroke", "sketch", "scribble", "sdedit", "img2img", "image to image", "variation", "paint"),
            [image_input("The strokes, or the picture to vary.")],
            [strength],
            [],
        )

    @classmethod
    def execute(
        cls,
        model,
        image: Tensor,
        steps: int,
        cfg: float,
        strength: float,
        recipe: Recipe | None = None,
        **shared: Any,
    ) -> io.NodeOutput:
        operator = Identity(picture(image))
        model, recipe = recipe_at(model, recipe_for(cls, model, recipe), *canvas(operator.size))
        cfg = cfg or recipe.guidance

        # Without a number of steps one-phase LoRAs take the two levels of the paper's strokes.
        grid = recipe.grid()
        plan = grid.plan_at_most(steps, strength) if steps else stroke_plan(grid, recipe.schedule(), strength)
        plan = replace(plan, notes=tuple(note.replace("denoise", "strength", 1) for note in plan.notes))

        lines = advice(cls, model, recipe, steps or recipe.steps, cfg, plan, shared["positive"])
        lines += [f"The strength is {plan.denoise:g}.", *remarks(operator)]
        return edited(cls, operator, plan, lines, model=model, recipe=recipe, cfg=cfg, **shared)


class PCMDenoise(io.ComfyNode):
    """PCM Denoise: a picture without its noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        noise = io.Float.Input(
            "noise",
            default=0.0,
            min=0.0,
            max=float(LEVELS),
            step=0.5,
            tooltip="How strong the noise in the picture is: its standard deviation in levels of 255, about 5 for a "
            "phone at night. 0 estimates it, and the node says what it found.",
        )
        return edit_schema(
            "PCMDenoise",
            "PCM Denoise",
            "Takes grain and sensor noise out of a picture: it enters the LoRA's levels where they are as noisy as the "
            "picture is.",
            ("denoise", "noise", "grain", "restore", "clean", "iso"),
            [image_input("The noisy picture.")],
            [noise],
            [],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image: Tensor,
        seed: int,
        steps: int,
        cfg: float,
        noise: float,
        recipe: Recipe | None = None,
        **shared: Any,
    ) -> io.NodeOutput:
        operator = Identity(picture(image))
        std = noise / LEVELS or estimated_noise(operator.start)
        estimate = [] if noise else [f"The noise was estimated: {LEVELS * std:.1f} levels of {LEVELS}."]
        model, recipe = recipe_at(model, recipe_for(cls, model, recipe), *canvas(operator.size))
        cfg = cfg or recipe.guidance

        codec = ModelVAE(vae, model.model)
        plan, amount = denoising(codec, operator.start, std, recipe.grid(), recipe.schedule(), steps or None, seed)
        if not plan.steps:
            # Through the VAE even a clean picture would change, so it is not sent there.
            text = show(cls, [*estimate, "There is none to take out: the picture is given back as it is."])
            return io.NodeOutput(image, {"samples": begin(operator, HostVAE(vae))}, ui=text)

        lines = advice(cls, model, recipe, steps or recipe.steps, cfg, plan, shared["positive"])
        lines = [*estimate, *lines, *remarks(operator)]
        return edited(
            cls,
            operator,
            plan,
            lines,
            model=model,
            recipe=recipe,
            vae=vae,
            seed=seed,
            cfg=cfg,
            amount=amount,
            **shared,
        )


class PCMInterpolate(io.ComfyNode):
    """PCM Interpolate: frames from one seed and prompt to another."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMInterpolate",
            display_name="PCM Interpolate",
            category=menu_of("KSampler"),
            description="Frames that go over from one seed and prompt to another. The first and the last are exactly "
            "the pictures that Sample PCM makes of the two.",
            search_aliases=["pcm", "phased consistency", "interpolate", "morph", "slerp", "animate", "transition"],
            inputs=[
                inputs.model(),
                inputs.recipe(),
                inputs.vae(),
                io.Latent.Input("latent_image", tooltip="One empty latent, for the size, or an encoded picture."),
                io.Conditioning.Input("positive", tooltip="What the first frame shows."),
                io.Conditioning.Input("positive_b", tooltip="What the last frame shows: another prompt, or the same."),
                io.Conditioning.Input("negative", tooltip="What to avoid. Used only when CFG is not 1."),
                inputs.seed(tooltip="The first frame's."),
                inputs.seed("seed_b", "The last frame's. With the same seed only the prompt moves."),
                inputs.steps(),
                inputs.cfg(),
                io.Int.Input("frames", default=8, min=2, max=1000, tooltip="How many, with the first and the last."),
                inputs.denoise(),
                inputs.last_decode(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The frames, as a batch."),
                io.Latent.Output(display_name="latent", tooltip="What they were decoded from."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        latent_image: dict[str, Any],
        positive: list,
        positive_b: list,
        negative: list,
        seed: int,
        seed_b: int,
        steps: int,
        cfg: float,
        frames: int,
        denoise: float,
        last_decode: str = inputs.LAST_DECODES[0],
        recipe: Recipe | None = None,
    ) -> io.NodeOutput:
        check_family(vae, model)
        latent = fit_to_model(model, latent_image)
        start = latent["samples"]
        model, recipe = recipe_at(model, recipe_for(cls, model, recipe), *pixels_of(model, start))
        steps = steps or recipe.steps
        cfg = cfg or recipe.guidance
        plan = recipe.grid().plan_at_most(steps, denoise)
        lines = [
            *advice(cls, model, recipe, steps, cfg, plan, positive),
            f"{frames} frames, each of them sampled by itself.",
        ]
        text = show(cls, lines)

        batch_index = latent.pop("batch_index", None)
        if len(start) != 1:
            raise ValueError(f"latent_image holds {len(start)} latents; the frames are all made of one.")

        # Both the noise that a frame starts from and the noise between its steps are mixed of the two seeds',
        # so that the first and the last frame are exactly what Sample PCM makes of them.
        seeds = (seed, seed_b)
        noise_a, noise_b = (comfy.sample.prepare_noise(start, s, batch_index) for s in seeds)
        on_device = torch.empty(start.shape, device=model.load_device)
        show_step = preview_callback(model, frames * plan.steps)
        drawn = []
        for i in range(frames):
            share = i / (frames - 1)
            drawn.append(
                draw(
                    model,
                    recipe,
                    plan,
                    cfg,
                    mixed(positive, positive_b, share),
                    negative,
                    latent,
                    slerp(noise_a, noise_b, share),
                    seeds[round(share)],
                    lambda step, x0, x, n, i=i: show_step(i * n + step, x0, x, frames * n),
                    noise_sampler=slerped(*(seeded_noise(on_device, s, batch_index) for s in seeds), share),
                )
            )

        image, notes = decode_last(vae, last_decode, lambda codec: torch.cat([codec.decode(z) for z in drawn]))
        if notes:
            text = show(cls, [*notes, *lines])
        return io.NodeOutput(image_of(image), latent | {"samples": torch.cat(drawn)}, ui=text)


def mixed(a: list, b: list, share: float) -> list:
    """The host CONDITIONING a share of the way from a to b, part by part; shares 0 and 1 are a and b.

    Linear in the text, the shorter one filled with zeros, and in the pooled text. All else is the nearer
    one's.
    Raises ValueError for conditionings of other numbers of parts, or of other text encoders.
    """
    if share in (0, 1):
        return (a, b)[int(share)]
    if len(a) != len(b):
        raise ValueError(f"positive has {len(a)} parts and positive_b {len(b)}: they must have as many to be mixed.")
    return [_mixed(*parts, share) for parts in zip(a, b, strict=True)]


def _mixed(a: list, b: list, share: float) -> list:
    """One part of `mixed`: [text (B, tokens, width), extras]."""
    text, extra = a
    text_b, extra_b = b
    if text.shape[-1] != text_b.shape[-1]:
        raise ValueError(
            f"positive is {text.shape[-1]} wide and positive_b {text_b.shape[-1]}: encode both with the same CLIP."
        )
    longest = max(text.shape[1], text_b.shape[1])
    text, text_b = (F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in (text, text_b))
    extras = (extra, extra_b)[round(share)].copy()
    pooled = [e["pooled_output"] for e in (extra, extra_b) if e.get("pooled_output") is not None]
    if pooled:
        extras["pooled_output"] = torch.lerp(pooled[0], pooled[-1], share)
    return [torch.lerp(text, text_b, share), extras]
