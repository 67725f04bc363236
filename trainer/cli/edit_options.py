"""Options that several edits of `pcm edit` have, as fields of dataclasses that know what to do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import SAMPLING, Sampling, answer

if TYPE_CHECKING:
    from ...samplers.operators import Operator
    from ..families import Condition
    from ..inference.edit import Edited, Editor
    from ..pictures import Pictures

KEEPING = "How the picture is kept"
FORMS = {"residual": True, "plain": False}

Out = Annotated[Path, typer.Option(help="PNG to write; several become NAME_1.png, NAME_2.png, ...")]
Images = Annotated[list[Path], typer.Option(help="Picture to edit. Repeat for several of one size.")]
Prompts = Annotated[
    list[str],
    typer.Option(help="What the finished picture shows; default: nothing is said. Repeat for one of each picture."),
]
Steps = Annotated[
    int,
    typer.Option(
        help="Default: the LoRA's, or 8 without one; stroke and denoise take fewer where it has no phases.",
        rich_help_panel=SAMPLING,
    ),
]
Projections = Annotated[
    str,
    typer.Option(
        help="What every step is made to agree with: the picture, through the VAE; its latent (inpaint and outpaint "
        "only; cheap and coarse); or none. The result agrees in any case.",
        rich_help_panel=KEEPING,
    ),
]
Every = Annotated[
    int,
    typer.Option(
        help="Only each n-th step, counted back from the end; default: 1, every step.", rich_help_panel=KEEPING
    ),
]
Form = Annotated[
    str,
    typer.Option(
        help="residual: add what the change of the picture changes in its latent; plain: the changed picture's latent. "
        "Default: residual.",
        rich_help_panel=KEEPING,
    ),
]
FastVae = Annotated[
    Path,
    typer.Option(
        help="Folder of an AutoencoderTiny, such as TAESD, for the steps; the result is decoded by the base's VAE.",
        rich_help_panel=KEEPING,
    ),
]


@dataclass(kw_only=True)
class Drawing(Sampling):
    """Of every edit: what draws, how, and where to."""

    out: Out
    steps: Steps = None

    def check(self) -> None:
        """Raise ValueError for options that cannot be, or do not fit each other: before anything is loaded."""
        from ..pictures import check_png

        check_png(self.out)
        if self.strength is not None and self.lora is None:
            raise ValueError(
                "--strength is the LoRA's, and there is no --lora. How far an edit goes from its picture is --denoise."
            )

    def editor(self, **more) -> Editor:
        """The base and the LoRA, loaded; more: of `open_editor`."""
        from ..inference.edit import open_editor

        how = {"steps": self.steps, "guidance": self.guidance, "gamma": self.gamma}
        return open_editor(self.load(self.lora), self.lora, self.strength, self.negative, **how, **more)

    def report(
        self, kind: str, editor: Editor, edited: Edited, files: list[Path], notes: Sequence[str] = (), **facts
    ) -> None:
        """Say what was done: what the user should know to stderr, the result to stdout."""
        from ...samplers.editing import CELL
        from ...samplers.phases import count_steps

        plan, (height, width) = edited.plan, edited.image.shape[-2:]
        warnings = list(dict.fromkeys([*notes, *editor.warnings(plan)]))
        for warning in warnings:
            typer.echo(warning, err=True)
        details = {"out": str(self.out), "files": [str(file) for file in files], "edit": kind}
        details |= {"steps": plan.steps, "ticks": plan.ticks, **editor.settings(), "seed": self.seed}
        details |= {"size": [width, height], "canvas": [CELL * side for side in edited.latents.shape[:1:-1]]}
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        text = f"{files[0]}{more}: {width}x{height}, {count_steps(plan.steps)}"
        answer(details | facts | {"warnings": warnings}, self.as_json, text)


@dataclass(kw_only=True)
class Changing(Drawing):
    """Of the edits that begin with a picture."""

    image: Images
    prompt: Prompts = None

    def pictures(self) -> Pictures:
        """The pictures; every option is checked first."""
        from ..pictures import read_pictures

        self.check()
        if len(self.prompt or [""]) not in (1, len(self.image)):
            raise ValueError(
                f"{len(self.prompt)} prompts for {len(self.image)} pictures: give one prompt, or one for each picture."
            )
        return read_pictures(self.image)

    def run(
        self,
        kind: str,
        pictures: Pictures,
        draw: Callable[[Editor, Condition], Edited],
        known: Operator | None = None,
        notes: Sequence[str] = (),
        **facts,
    ) -> None:
        """Draw, write and say it. known: what the result must agree with, if anything."""
        from ..inference.edit import kept_error
        from ..pictures import numbered, write_pictures

        editor = self.editor(**self.loop())
        edited = draw(editor, editor.base.encode_prompts(self.prompt or [""]))
        files = numbered(self.out, len(self.image)) if len(self.image) > 1 else [self.out]
        write_pictures(edited.image, files, pictures.profiles)
        kept = known and kept_error(known, edited.image)
        self.report(kind, editor, edited, files, notes, **facts, kept_error=kept)

    def loop(self) -> dict:
        """What the editor is told of its loop."""
        return {}


@dataclass(kw_only=True)
class Keeping(Changing):
    """Of the edits that keep what an operator knows of the picture."""

    projection: Projections = "picture"
    every: Every = None
    form: Form = None
    fast_vae: FastVae = None

    def check(self) -> None:
        from ..inference.edit import PROJECTIONS

        super().check()
        for name, value, known in (("projection", self.projection, PROJECTIONS), ("form", self.form, FORMS)):
            if value is not None and value not in known:
                raise ValueError(f"--{name} is {value!r}; available: {', '.join(known)}.")
        given = {"--every": self.every, "--form": self.form, "--fast-vae": self.fast_vae}
        unused = [name for name, value in given.items() if value is not None]
        if unused and self.projection != "picture":
            raise ValueError(
                f"{unused[0]} is for --projection picture, and it is {self.projection}. Leave {unused[0]} out."
            )

    def loop(self) -> dict:
        how = {"projection": self.projection, "fast_vae": self.fast_vae, "residual": FORMS[self.form or "residual"]}
        return how | ({} if self.every is None else {"every": self.every})

    def keep(self, kind: str, pictures: Pictures, known: Operator, denoise: float, **more) -> None:
        """`run` of an edit that is its operator."""
        from ...samplers.operators import Inpaint

        if self.projection == "latent" and not isinstance(known, Inpaint):
            raise ValueError(
                f"--projection latent is for inpaint and outpaint: what {kind} keeps is in no cell of the latent. "
                "Choose picture or none."
            )
        self.run(kind, pictures, lambda editor, prompt: editor.edit(known, prompt, self.seed, denoise), known, **more)
