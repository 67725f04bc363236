"""Run by a host's own Python: copies of a checkpoint whose linear layers are packed in the host's own formats.

python quantized.py HOST_FOLDER CHECKPOINT FOLDER

Writes FOLDER/checkpoints/<format>.safetensors for each of `FORMATS` that this host knows, and for each of `GGUF`
FOLDER/diffusion_models/<format>.gguf where its Python has gguf, which ComfyUI-GGUF needs. Prints their names as JSON.
"""

from __future__ import annotations

import json
import sys
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


def main() -> None:
    host, checkpoint, folder = sys.argv[1:]
    sys.path[0] = host  # not this file's own folder, which has a server.py too
    answers, sys.stdout = sys.stdout, sys.stderr  # the host prints
    from comfy.cli_args import args

    args.cpu = True
    try:
        from comfy.quant_ops import QUANT_ALGOS
    except ImportError:  # of 0.3.64
        QUANT_ALGOS = {}
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint)
    made = [name for name, (kind, _) in FORMATS.items() if kind in QUANT_ALGOS]
    for name in made:
        packed = {k: v for key, tensor in tensors.items() for k, v in pack(key, tensor, *FORMATS[name]).items()}
        save_file(packed, Path(folder, "checkpoints", f"{name}.safetensors"))
    try:
        import gguf  # noqa: F401
    except ImportError:
        return json.dump(made, answers)
    network = {k.removeprefix(NETWORK): v for k, v in tensors.items() if k.startswith(NETWORK)}
    for name in GGUF:
        write_gguf(Path(folder, "diffusion_models", f"{name}.gguf"), network, name)
    return json.dump([*made, *GGUF], answers)


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


if __name__ == "__main__":
    main()
