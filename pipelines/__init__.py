"""For diffusers' own pipelines: a scheduler for few-step LoRAs. It needs diffusers, and nothing of the trainer."""

from .scheduler import PCMScheduler, PCMSchedulerOutput

__all__ = ["PCMScheduler", "PCMSchedulerOutput"]
