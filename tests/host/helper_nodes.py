"""Nodes for the host tests alone: copied into the temporary custom_nodes, never part of the pack."""

import sys

import torch
from safetensors.torch import load_file


class TestConditioning:
    """Random text conditioning of any width, so that no text encoder is needed."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        widths = {"width": ("INT", {"default": 768}), "pooled": ("INT", {"default": 2048})}
        return {"required": {"seed": ("INT", {"default": 0}), **widths}}

    def make(self, seed, width, pooled):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 77, width, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


class TestEncoding:
    """Prompt `number` of a file of encodings as the trainer makes them, for a picture of this side."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {}), "number": ("INT", {}), "side": ("INT", {})}}

    def make(self, path, number, side):
        read = {k.split(" ")[1]: v for k, v in load_file(path).items() if k.startswith(f"{number} ")}
        extra = {f"{kind}{axis}": side for kind in ("", "target_") for axis in ("width", "height")}
        extra |= {"crop_w": 0, "crop_h": 0} | ({"pooled_output": read["pooled"]} if "pooled" in read else {})
        return ([[read["hidden"], extra]],)


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


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in (TestConditioning, TestEncoding, TestLatent, TestSigmas)}
