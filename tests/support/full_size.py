"""Runs of full size, planned without a weight; measuring what they hold takes seconds."""

from __future__ import annotations

from typing import Any

from phased_consistency.trainer.config.load import load_config
from phased_consistency.trainer.training.plan import plan


def planned(preset: str) -> dict[str, Any]:
    """The plan of a preset as it is shipped."""
    return plan(load_config(preset=preset))
