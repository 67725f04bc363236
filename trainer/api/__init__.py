"""What a Python program calls: the same runs, pictures and reports as `pcm`'s verbs, without a terminal.

`phased_consistency` itself has each of these names, and imports what it needs at its first use.
"""

from .drawing import edit, load_base, sample
from .files import evaluate, inspect, load_lora
from .training import configure, plan, train

__all__ = ["configure", "edit", "evaluate", "inspect", "load_base", "load_lora", "plan", "sample", "train"]
