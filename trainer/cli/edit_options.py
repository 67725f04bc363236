"""The groups of options of `pcm edit`, and the request that an edit makes of them: what all edits do in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import SAMPLING, BaseOptions, Json, SamplingOptions, answer, check_files

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
Projection = Annotated[
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
class OutputOptions:
    """What every edit takes beside its base and its LoRA: a group of options, see `options.verb`."""

    out: Out
    steps: Steps = None
    as_json: Json = False


@dataclass(kw_only=True)
class PictureOptions:
    """The pictures that an edit begins with, and what they are to show: a group of options."""

    image: Images
    prompt: Prompts = None

    def check(self) -> None:
        """Raise ValueError for prompts that are neither one nor as many as the pictures."""
        if len(self.prompt or [""]) not in (1, len(self.image)):
            raise ValueError(
                f"{len(self.prompt)} prompts for {len(self.image)} pictures: give one prompt, or one for each picture."
            )


@dataclass(kw_only=True)
class KeepingOptions:
    """How an edit keeps what its operator knows of the picture: a group of options.

    Those that are None are as `Editor` has them, and fit any projection.
    """

    projection: Projection = "picture"
    every: Every = None
    form: Form = None
    fast_vae: FastVae = None

    def check(self) -> None:
        """Raise ValueError for a value that there is not, and for options that this projection has no use for."""
        from ...samplers.editing import PROJECTIONS

        for name, value, known in (("projection", self.projection, PROJECTIONS), ("form", self.form, FORMS)):
            if value is not None and value not in known:
                raise ValueError(f"--{name} is {value!r}; available: {', '.join(known)}.")
        options = {"--every": self.every, "--form": self.form, "--fast-vae": self.fast_vae}
        unused = [name for name, value in options.items() if value is not None]
        if unused and self.projection != "picture":
            raise ValueError(
                f"{unused[0]} is for --projection picture, and it is {self.projection}. Leave {unused[0]} out."
            )


@dataclass
class EditRequest:
    """One `pcm edit KIND`, and its parts in the order in which they run: check, read, draw, write, tell.

    source: None for an edit that begins with no picture. keeping: left as it is by an edit that keeps nothing.
    """

    kind: str
    base: BaseOptions
    sampling: SamplingOptions
    output: OutputOptions
    source: PictureOptions | None = None
    keeping: KeepingOptions = field(default_factory=KeepingOptions)

    def check(self) -> None:
        """Raise ValueError for options that cannot be, or do not fit each other: before anything is loaded.

        Raises FileNotFoundError for a LoRA that is not there.
        """
        from ..pictures import check_png

        check_png(self.output.out)
        if self.sampling.strength is not None and self.sampling.lora is None:
            raise ValueError(
                "--strength is the LoRA's, and there is no --lora. How far an edit goes from its picture is --denoise."
            )
        check_files(self.sampling.lora)
        self.keeping.check()
        if self.source:
            self.source.check()

    def read_pictures(self) -> Pictures:
        """The pictures to edit; every option is checked first."""
        from ..pictures import read_pictures

        self.check()
        return read_pictures(self.source.image)

    def open_editor(self) -> Editor:
        """The base and the LoRA, loaded."""
        from ..inference.edit import open_editor

        sampling, keeping = self.sampling, self.keeping
        return open_editor(
            self.base.load(sampling.lora),
            sampling.lora,
            sampling.strength,
            sampling.negative,
            steps=self.output.steps,
            guidance=sampling.guidance,
            gamma=sampling.gamma,
            projection=keeping.projection,
            every=1 if keeping.every is None else keeping.every,
            residual=FORMS[keeping.form or "residual"],
            fast_vae=keeping.fast_vae,
        )

    def keep(self, operator: Operator, denoise: float, pictures: Pictures, notes: Sequence[str] = ()) -> None:
        """Draw what the operator does not know, and write and tell the result. denoise: as `Editor.edit`."""
        from ...samplers.operators import Inpaint

        if self.keeping.projection == "latent" and not isinstance(operator, Inpaint):
            raise ValueError(
                f"--projection latent is for inpaint and outpaint: what {self.kind} keeps is in no cell of the latent. "
                "Choose picture or none."
            )

        def draw(editor: Editor, prompts: Condition) -> Edited:
            return editor.edit(operator, prompts, self.sampling.seed, denoise)

        self.draw(draw, pictures, notes, operator=operator)

    def draw(
        self,
        draw: Callable[[Editor, Condition], Edited],
        pictures: Pictures,
        notes: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        operator: Operator | None = None,
    ) -> None:
        """Draw from the pictures, and write and tell the result.

        draw: from the editor and the encoded prompts. notes: warnings for the user. facts: for --json beside the usual.
        operator: what the result must agree with, if anything.
        """
        from ..inference.edit import kept_error
        from ..pictures import numbered, write_pictures

        editor, out = self.open_editor(), self.output.out
        edited = draw(editor, editor.base.encode_prompts(self.source.prompt or [""]))

        files = numbered(out, len(pictures.files)) if len(pictures.files) > 1 else [out]
        write_pictures(edited.image, files, pictures.profiles)

        error = kept_error(operator, edited.image) if operator else None
        self.tell(editor, edited, files, notes, {**(facts or {}), "kept_error": error})

    def tell(
        self, editor: Editor, edited: Edited, files: list[Path], notes: Sequence[str], facts: Mapping[str, Any]
    ) -> None:
        """Say what was done: what the user should know to stderr, the result to stdout."""
        from ...samplers.editing import CELL
        from ...samplers.phases import count_steps

        plan = edited.plan
        height, width = edited.image.shape[-2:]
        warnings = list(dict.fromkeys([*notes, *editor.warnings(plan)]))
        for warning in warnings:
            typer.echo(warning, err=True)

        details = {
            "out": str(self.output.out),
            "files": [str(file) for file in files],
            "edit": self.kind,
            "steps": plan.steps,
            "ticks": plan.ticks,
            **editor.settings(),
            "seed": self.sampling.seed,
            "size": [width, height],
            "canvas": [CELL * side for side in edited.latents.shape[:1:-1]],
            **facts,
            "warnings": warnings,
        }
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        text = f"{files[0]}{others}: {width}x{height}, {count_steps(plan.steps)}"
        answer(details, self.output.as_json, text)
