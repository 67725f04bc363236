"""How `pcm` begins: its verbs where what they need is installed, else a sentence on what to install."""

from __future__ import annotations

import sys

from . import INSTALL


def start() -> None:
    """Run `pcm`; exits with 1, and without a traceback, where a package is missing."""
    try:
        from .main import main

        main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "phased_consistency"):
            raise
        sys.exit(f"Error: pcm needs {package}, which is not installed for {sys.executable}. Run: {INSTALL}")
