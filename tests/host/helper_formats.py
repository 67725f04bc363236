"""A node for the host tests alone: copies of a checkpoint whose linear layers are packed in the host's own formats."""

from __future__ import annotations

import json
from pathlib import Path

FORMATS = {  # name -> the host's name, and settings of a layer
    "fp8": ("float8_e4m3fn", {}),
    "int8": ("int8_tensorwise", {}),
    "convrot": ("int8_tensorwise", {"convrot": True, "convrot_groupsize": 64}),
    "nvfp4": ("nvfp4", {}),
}
GGUF = ("Q8_0", "Q4_0")
NETWORK = "model.diffusion_model."
KEPT = "attn2.to_k"  # the host tells the family by the sides of this weight


class TestPacked:
    """Puts the names of the formats in which the copies are there into the history.

    Writes `<folder>/checkpoints/<format>.safetensors` for each of `FORMATS` that this host knows, and for each of
    `GGUF` `<folder>/diffusion_models/<format>.gguf` where its Python has gguf, which ComfyUI-GGUF needs.
    """

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "write", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"checkpoint": ("STRING", {}), "folder": ("STRING", {})}}

    def write(self, checkpoint, folder):
        from safetensors.torch import load_file

        tensors = load_file(checkpoint)
        formats = write_formats(Path(folder, "checkpoints"), tensors)
        return {"ui": {"formats": [*formats, *write_ggufs(Path(folder, "diffusion_models"), tensors)]}}


def write_formats(folder: Path, tensors: dict) -> list[str]:
    """Write a checkpoint in each of `FORMATS` that this host knows; returns their names."""
    from safetensors.torch import save_file

    try:
        from comfy.quant_ops import QUANT_ALGOS
    except ImportError:  # of 0.3.64
        QUANT_ALGOS = {}
    known = [name for name, (kind, _) in FORMATS.items() if kind in QUANT_ALGOS]
    for name in known:
        packed = {k: v for key, tensor in tensors.items() for k, v in pack(key, tensor, *FORMATS[name]).items()}
        save_file(packed, folder / f"{name}.safetensors")
    return known


def write_ggufs(folder: Path, tensors: dict) -> tuple[str, ...]:
    """Write a checkpoint's network in each of `GGUF`; returns their names, none where this Python has no gguf."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return ()
    network = {k.removeprefix(NETWORK): v for k, v in tensors.items() if k.startswith(NETWORK)}
    for name in GGUF:
        write_gguf(folder / f"{name}.gguf", network, name)
    return GGUF


def write_gguf(path: Path, network: dict, kind: str) -> None:
    """A network as ComfyUI-GGUF reads it: blocks of 32 numbers with a scale each, in its linear layers."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(path, "sd1")
    for name, tensor in network.items():
        linear = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "transformer" in name
        form = GGMLQuantizationType[kind if linear else "F32"]
        writer.add_tensor(name, quantize(tensor.float().numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pack(key: str, weight, kind: str, settings: dict) -> dict:
    """A layer's entries: packed for the network's linear layers, and as they are for all others."""
    import torch
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    linear = key.startswith(NETWORK) and key.endswith(".weight") and weight.ndim == 2 and "transformer" in key
    if not linear or KEPT in key:
        return {key: weight}
    layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
    options = settings | {"per_channel": True} if settings else {}
    packed = QuantizedTensor.from_float(weight.bfloat16(), layout, **options).state_dict(key)
    entry = json.dumps({"format": kind} | settings).encode()
    packed[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(list(entry), dtype=torch.uint8)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


NODE_CLASS_MAPPINGS = {TestPacked.__name__: TestPacked}
