"""The mathematics of phased consistency: schedules, phases, samplers, recipes. torch and the standard library only."""

from .known_files import recipe_for_file
from .phases import LevelPlan, PhaseGrid
from .recipe import Recipe, normalcfg_guidance
from .sampling import SAMPLERS, sample_consistency, sample_dpmpp_2m, sample_phased, seeded_noise
from .schedule import (
    FlowSchedule,
    Schedule,
    VPSchedule,
    eps_of,
    extrapolated,
    jump,
    output_from_x0_eps,
    renoise,
    x0_eps_from_output,
)

__all__ = [
    "SAMPLERS",
    "FlowSchedule",
    "LevelPlan",
    "PhaseGrid",
    "Recipe",
    "Schedule",
    "VPSchedule",
    "eps_of",
    "extrapolated",
    "jump",
    "normalcfg_guidance",
    "output_from_x0_eps",
    "recipe_for_file",
    "renoise",
    "sample_consistency",
    "sample_dpmpp_2m",
    "sample_phased",
    "seeded_noise",
    "x0_eps_from_output",
]
