"""How the parts of the trainer tell the user something while they work: by a function that they are given."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]  # called with a sentence
