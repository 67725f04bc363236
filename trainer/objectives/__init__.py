"""Objectives: each a row of the choices that make one distillation step (see `engine`)."""

from __future__ import annotations

from .pcm import PCM

OBJECTIVES = {"pcm": PCM}
