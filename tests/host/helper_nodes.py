"""Nodes for the host tests alone: copied into the temporary custom_nodes, never part of the pack."""

import sys

import torch


class TestConditioning:
    """Random text conditioning of any width, so that no text encoder is needed."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "width": ("INT", {"default": 768})}}

    def make(self, seed, width):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 77, width, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, 2048, generator=generator)}]],)


class TestLatent:
    """A random latent of 8 x 8, in the form that the host keeps latents."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "batch": ("INT", {"default": 1})}}

    def make(self, seed, batch):
        return ({"samples": 5 * torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))},)


class TestSigmas:
    """Puts SIGMAS, and what the process has imported, into the history."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "show", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",)}}

    def show(self, sigmas):
        return {"ui": {"sigmas": sigmas.tolist(), "modules": list(sys.modules)}}


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in (TestConditioning, TestLatent, TestSigmas)}
