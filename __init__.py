"""phased-consistency: ComfyUI nodes and a trainer for few-step images with Phased Consistency Models."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .samplers import PhaseGrid as PhaseGrid
    from .samplers import Recipe as Recipe
    from .trainer.api import configure as configure
    from .trainer.api import edit as edit
    from .trainer.api import evaluate as evaluate
    from .trainer.api import inspect as inspect
    from .trainer.api import load_base as load_base
    from .trainer.api import load_lora as load_lora
    from .trainer.api import plan as plan
    from .trainer.api import sample as sample
    from .trainer.api import train as train
    from .trainer.inference.scheduler import PCMScheduler as PCMScheduler

# What a program imports from here (docs/python.md) -> the module that has it, imported when the name is first used: in
# the host nobody waits for diffusers.
NAMES = {
    "PCMScheduler": ".trainer.inference.scheduler",
    **dict.fromkeys(("PhaseGrid", "Recipe"), ".samplers"),
    **dict.fromkeys(("configure", "plan", "train"), ".trainer.api"),
    **dict.fromkeys(("load_base", "sample", "edit"), ".trainer.api"),
    **dict.fromkeys(("evaluate", "inspect", "load_lora"), ".trainer.api"),
}
WEB_DIRECTORY = "./nodes/web"

# The host imports this folder as a package and has `comfy_api`; the trainer and test collectors do not. (Any folder
# called comfy on the path would pass for `comfy`, and comfy-cli makes one in the home.)
if __package__ and importlib.util.find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint as comfy_entrypoint


def __getattr__(name: str) -> Any:
    """A name of `NAMES`, from its module."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(NAMES))}.")
    try:
        return getattr(importlib.import_module(NAMES[name], __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or __name__).partition(".")[0] == __name__:
            raise
        extra = "diffusers" if NAMES[name] == ".trainer.inference.scheduler" else "train"
        raise ModuleNotFoundError(
            f'{name} needs {error.name}, which is not installed. Run: pip install "phased-consistency[{extra}]"',
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})
