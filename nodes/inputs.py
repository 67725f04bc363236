"""Inputs that several nodes have: each is worded once, and its order is that of the lists here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..samplers.recipe import MODES as RECIPE_MODES
from .host import RecipeType, supported
from .lora_on_model import LEVELS

MODES = ("from recipe", "deterministic", "stochastic", "gamma")
NOISES = ("per picture", "per batch")  # how noise between steps is drawn
FORMS = ("residual", "plain")
PROJECTIONS = ("picture", "latent")
LAST_DECODES = ("whole", "tiled")


def check(name: str, value: str, options: tuple[str, ...]) -> None:
    """Raise ValueError for a choice that there is not: 0.3.64 lets those through."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; available: {', '.join(options)}.")


def lora(tooltip: str) -> io.Input:
    """A choice of the files in models/loras."""
    return io.Combo.Input("lora", options=folder_paths.get_filename_list("loras"), tooltip=tooltip)


def lora_state(lora: str) -> str:
    """A text that changes when a LoRA's file does, for `fingerprint_inputs`."""
    return file_state(folder_paths.get_full_path("loras", lora))


def file_state(path: str | Path | None) -> str:
    """A text that changes when a file changes, comes or goes."""
    return f"{Path(path).stat().st_mtime_ns}" if path and Path(path).exists() else "absent"


def model() -> io.Input:
    return io.Model.Input("model", tooltip="From Load PCM LoRA, with other LoRAs or patches after it if you like.")


def recipe(
    tooltip: str = "From Load PCM LoRA or PCM Recipe; without it, the one that the model carries.",
    optional: bool = True,
) -> io.Input:
    # Where Load PCM LoRA is bypassed nothing comes: a node then says what to do (`lora_on_model.recipe_for`), instead
    # of the host, which only says that an input is missing.
    return RecipeType.Input("recipe", tooltip=tooltip, optional=optional)


def recipe_widgets(auto: str, methods: Iterable[str] = ()) -> list[io.Input]:
    """Where a recipe comes from, and the widgets of one that no file tells, as `lora_on_model.recipe_from_widgets`
    reads them.

    auto: what that choice takes. methods: further choices, keys of `METHOD_FILES`, whose steps are `phases`.
    """
    by_widgets = "Read only where the recipe comes from the widgets."
    by_phases = "Read for a method, and where the recipe comes from the widgets." if methods else by_widgets
    chosen = " A method: as its own files are sampled, in as many steps as phases says." if methods else ""
    return [
        supported(
            io.Combo.Input,
            "recipe",
            options=["auto", *methods, "widgets"],
            default="auto",
            advanced=not methods,
            tooltip=f"auto: {auto}.{chosen} widgets: always from the widgets below.",
        ),
        supported(
            io.Int.Input,
            "phases",
            default=4,
            min=1,
            max=40,
            advanced=not methods,
            tooltip=f"Steps that the LoRA was made for. {by_phases}",
        ),
        supported(
            io.Combo.Input,
            "mode",
            options=list(RECIPE_MODES),
            default=RECIPE_MODES[0],
            advanced=True,
            tooltip="deterministic for PCM, Hyper-SD and Lightning LoRAs, stochastic for LCM, TCD and DMD2. "
            f"{by_widgets}",
        ),
        supported(
            io.Float.Input,
            "cfg",
            default=1.0,
            min=1.0,
            max=20.0,
            step=0.1,
            advanced=True,
            tooltip=f"CFG that the LoRA was made for; 1 is no guidance. {by_widgets}",
        ),
        supported(
            io.Float.Input,
            "gamma",
            optional=True,  # as are the widgets after it: graphs of earlier versions have none
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="How much of the noise between steps is fresh, in the mode stochastic: 1 for LCM and DMD2, 0.3 for "
            f"TCD. {by_widgets}",
        ),
        supported(
            io.Combo.Input,
            "levels",
            optional=True,
            options=list(LEVELS),
            default=LEVELS[0],
            advanced=True,
            tooltip="even: timesteps 999, 749, 499, 249 for 4 steps, as PCM, Hyper-SD, Lightning and DMD2. "
            f"lcm: 999, 759, 499, 259, as LCM and TCD. {by_widgets}",
        ),
        *given_levels(by_widgets),
    ]


def given_levels(by_widgets: str) -> list[io.Input]:
    """The levels of a recipe by hand where its authors give them one by one, and what moves and divides them."""
    lists = {
        "sigmas": "Noise levels from noisy to clean, such as 1, 0.65, 0.44, 0.29, where the authors list them: they "
        "are used as they are, whatever the shift. They take the place of phases and levels.",
        "timesteps": "The same as timesteps, such as 1000, 750, 500, 250; of a flow model before its shift, which "
        "then moves them.",
    }
    return [
        *(
            supported(io.String.Input, name, optional=True, default="", advanced=True, tooltip=f"{text} {by_widgets}")
            for name, text in lists.items()
        ),
        supported(
            io.Float.Input,
            "shift",
            optional=True,
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            advanced=True,
            tooltip="Time shift of a flow model that the LoRA was made for, such as 3 for Qwen-Image-Lightning and 5 "
            f"for Wan Lightning; of one that is told as mu, exp(mu). 0: as the model has it. {by_widgets}",
        ),
        supported(
            io.Float.Input,
            "boundary",
            optional=True,
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            round=False,
            advanced=True,
            tooltip="For two experts: the noise level at and above which the high-noise model is in charge; Wan 2.2 "
            f"has 0.875 for text to video, 0.9 for image to video. 0: one model. {by_widgets}",
        ),
    ]


def low_noise_model() -> io.Input:
    return io.Model.Input(
        "low_noise_model",
        optional=True,
        tooltip="For models of two experts, such as Wan 2.2 14B: the low-noise one, with its own LoRA, while model is "
        "the high-noise one. The recipe tells at which noise level the second one takes over.",
    )


def vae(tooltip: str = "The VAE of the checkpoint, or another of its family.") -> io.Input:
    return io.Vae.Input("vae", tooltip=tooltip)


def prompts() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="What to show."),
        io.Conditioning.Input("negative", tooltip="What to avoid. Used only when CFG is not 1."),
    ]


def seed(name: str = "seed", tooltip: str = "One seed is one picture, on every device.") -> io.Input:
    return io.Int.Input(
        name, default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=name == "seed", tooltip=tooltip
    )


def steps() -> io.Input:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=100,
        tooltip="0: as the recipe recommends. A deterministic LoRA is made for exactly one number of steps.",
    )


def cfg() -> io.Input:
    return io.Float.Input(
        "cfg",
        default=0.0,
        min=0.0,
        max=20.0,
        step=0.1,
        round=0.01,
        tooltip="0: as the recipe recommends. 1 is no guidance: the negative prompt is not used, and a "
        "step takes half the time. Above the LoRA's range the picture burns.",
    )


def denoise(default: float = 1.0, start: str = "the given latent") -> io.Input:
    return io.Float.Input(
        "denoise",
        default=default,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip=f"1 draws from noise alone; below 1 keeps more of {start}. The start moves to the nearest phase "
        "edge of the LoRA, so fewer steps run, and the node says which strength that is.",
    )


def picture_size() -> list[io.Input]:
    """The size of the picture, where no latent tells it; `Recipe.at_size` reads it."""
    return [
        supported(
            io.Int.Input,
            name,
            optional=True,  # graphs of earlier versions have none
            default=1024,
            min=16,
            max=16384,
            step=8,
            advanced=True,
            tooltip=f"{name.capitalize()} of the picture in pixels. Read only for a recipe whose shift hangs on it, "
            "such as those of FLUX.1 LoRAs.",
        )
        for name in ("width", "height")
    ]


def mode() -> list[io.Input]:
    """The share of fresh noise between steps, by recipe or by hand; `sampling.gamma_of` reads these."""
    return [
        recipe("From Load PCM LoRA. Needed for the mode 'from recipe', and by some one-step LoRAs in any."),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default=MODES[0],
            tooltip="deterministic adds no noise between steps. stochastic takes all noise fresh, as the lcm "
            "sampler does. gamma mixes the two. Other than the LoRA's own is for trying things out.",
        ),
        io.Float.Input(
            "gamma",
            default=0.3,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Used only in the mode 'gamma'. 0 is deterministic, 1 all noise fresh; TCD uses 0.3.",
        ),
    ]


def noise_between() -> io.Input:
    """How the fresh noise between steps is drawn; `sampling.sampler` reads it."""
    return supported(
        io.Combo.Input,
        "noise",
        optional=True,  # graphs of earlier versions have none, and get the default
        options=list(NOISES),
        default=NOISES[0],
        advanced=True,
        tooltip="Used where noise is fresh between steps. per picture: a picture is the same alone and in any batch. "
        "per batch: one block for all, as core's samplers draw it.",
    )


def loop() -> list[io.Input]:
    """The loop of an edit: at which steps, and in which form, x0 is made to agree with what is known."""
    return [
        supported(
            io.Int.Input,
            "every",
            default=1,
            min=1,
            max=100,
            optional=True,
            advanced=True,
            tooltip="1 makes every step agree with the picture, through the VAE. 2 is every second step, which is "
            "faster.",
        ),
        _choice(
            "form",
            FORMS,
            "residual adds only what has to change, so the VAE's own error stays out. plain encodes the whole "
            "picture again, which is faster and softer.",
        ),
    ]


def step_vae() -> io.Input:
    return supported(
        io.Vae.Input,
        "step_vae",
        optional=True,
        advanced=True,
        tooltip="A faster VAE of the same family, such as TAESD, for the steps in between. The last picture still "
        "comes from vae.",
    )


def projection() -> io.Input:
    return _choice(
        "projection",
        PROJECTIONS,
        "picture: every step agrees with the pixels around the mask, through the VAE. latent: with the latent "
        "around it, which takes no VAE and no time, and fits a little less well.",
    )


def last_decode() -> io.Input:
    return _choice(
        "last_decode",
        LAST_DECODES,
        "How the finished latent becomes the picture. tiled takes less memory, and may leave faint seams in "
        "what was drawn.",
    )


def _choice(name: str, options: tuple[str, ...], tooltip: str) -> io.Input:
    """An advanced choice; the first is the default."""
    return supported(
        io.Combo.Input,
        name,
        options=list(options),
        default=options[0],
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )
