"""LoRA files by their safetensors header alone: names, shapes, family, key styles, alpha, but no weights.

Every published key style is brought to one name per module, kohya's (lora_unet_*; for SD3
lora_transformer_*). The host maps those whole; of the PEFT and diffusers styles it drops all attention
projections for SD1.5 and SDXL.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .recipe import FAMILIES, HEADER_KEY, Recipe
from .texts import brief

# suffix of a tensor's name -> the part of the module that the tensor is, most specific first
PARTS = (
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    (".alpha", "alpha"),
)
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
TEXT_ENCODERS = (("text_encoder.", "lora_te_"), ("text_encoder_2.", "lora_te2_"), ("text_encoder_3.", "lora_te3_"))
WRAPPERS = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
SD3_ROOTS = ("transformer_blocks", "context_embedder", "pos_embed", "time_text_embed", "norm_out", "proj_out")
ARCHITECTURES = (
    ("stable-diffusion-v1", "sd15"),
    ("stable-diffusion-v2", "sd2"),
    ("stable-diffusion-xl", "sdxl"),
    ("stable-diffusion-v3", "sd3"),
    ("stable-diffusion-3", "sd3"),
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FLOATS = frozenset(DTYPES)
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
CONTEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
UNET_CONTEXT = re.compile(r"_(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_.*attn2_to_k$")
SD3_WIDTHS = (1536, 2432)
PEFT_KEY = "lora_adapter_metadata"
LONGEST_NAME = 1000  # characters; published ones have up to 120
SD3_PROJECTION = re.compile(
    r"(?<!single_)transformer_blocks_\d+_(attn_to_k|attn_add_k_proj|norm1_context_linear)$|joint_blocks_\d+_\w*attn_qkv$"
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it; dtype in its letters, such as "F16"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class LoraModule:
    """One adapted module: its tensors' names by part ("down", "up", "alpha"), their shapes and their dtypes."""

    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """Rank by the `down` half, its first side; None where there is no such half, or it has no sides."""
        return next(iter(self.shapes.get("down", ())), None)

    @property
    def is_whole(self) -> bool:
        """Whether both halves are there, (rank, in, ...) and (out, rank, ...), of one rank, in floating point."""
        down, up = (self.shapes.get(part, ()) for part in ("down", "up"))
        floating = all(self.dtypes.get(part) in FLOATS for part in ("down", "up"))
        return floating and len(down) >= 2 and len(up) >= 2 and up[1] == down[0] > 0

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the module is whole, and up @ down has the shape of this weight, (out, in, *kernel)."""
        if not self.is_whole:
            return False
        down, up = self.shapes["down"], self.shapes["up"]
        return up[0] == weight_shape[0] and prod(down[1:]) == prod(weight_shape[1:])


@dataclass(frozen=True)
class LoraHeader:
    """A LoRA file as its header describes it."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def modules(self) -> dict[str, LoraModule]:
        """kohya module name -> module; raises ValueError when the file holds no LoRA, or a weight under two names."""
        modules: dict[str, LoraModule] = {}
        for name, info in self.tensors.items():
            if (split := split_key(name)) is not None:
                module, part = split
                entry = modules.setdefault(module, LoraModule())
                if part in entry.keys:
                    twice = f"{entry.keys[part]} and {name}"
                    raise ValueError(f"{self.path.name} has one weight under two names, {twice}. Get the file again.")
                entry.keys[part] = name
                entry.shapes[part] = info.shape
                entry.dtypes[part] = info.dtype

        # An alpha alone is of some other kind of adapter, such as LoHa, whose halves have other names.
        modules = {k: m for k, m in modules.items() if "down" in m.keys or "up" in m.keys}
        if not modules:
            examples = ", ".join(list(self.tensors)[:3]) or "no tensors at all"
            raise ValueError(
                f"{self.path.name} holds no LoRA: none of its {len(self.tensors)} tensor names is a LoRA's (they are "
                f"like {examples}). Use a LoRA file, not a checkpoint or an embedding."
            )
        return modules

    @property
    def unmatched(self) -> list[str]:
        """Tensor names that belong to no LoRA style known here (LoHa, LoKr, biases, ...)."""
        return [name for name in self.tensors if split_key(name) is None]

    @property
    def family(self) -> str | None:
        """Model family by the width of its text conditioning, else by its metadata; None when neither tells."""
        for name, module in self.modules.items():
            down = module.shapes.get("down", ())
            if UNET_CONTEXT.search(name) and len(down) >= 2 and down[1] in CONTEXT_WIDTHS:
                return CONTEXT_WIDTHS[down[1]]
            if SD3_PROJECTION.search(name) and len(down) >= 2 and down[1] in SD3_WIDTHS:
                return "sd3"
        return family_from_metadata(self.metadata)

    def scale_alphas(self) -> dict[str, float]:
        """module -> alpha, where it is not a tensor but in the PEFT metadata, which the host ignores.

        Raises ValueError for metadata of another form, and for an alpha that is not a finite number.
        """
        text = self.metadata.get(PEFT_KEY)
        if not text:
            return {}
        try:
            # The keys are "unet.lora_alpha" and the like; of several components the first counts.
            config = {key.split(".")[-1]: value for key, value in reversed(json.loads(text).items())}
            patterns = config.get("alpha_pattern") or {}
            patterns = {key.replace(".", "_"): _number(value) for key, value in patterns.items()}
            alpha = config.get("lora_alpha")
            alpha = None if alpha is None else _number(alpha)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{self.path.name}: its {PEFT_KEY} cannot be read ({brief(error)}). Get the file again."
            ) from error
        alphas = {}
        for name, module in self.modules.items():
            module_alpha = next((v for k, v in patterns.items() if name.endswith(k)), alpha)
            if module_alpha is not None and "alpha" not in module.keys:
                alphas[name] = module_alpha
        return alphas

    def alphas(self) -> dict[str, float]:
        """module -> alpha, from the file's tensors or the PEFT metadata, for the modules that have one.

        Reads those few numbers and no other tensor. Raises ValueError for an alpha that is not one number.
        """
        keys = {name: module.keys["alpha"] for name, module in self.modules.items() if "alpha" in module.keys}
        numbers = _read_numbers(self.path, set(keys.values()))
        return self.scale_alphas() | {name: numbers[key] for name, key in keys.items()}

    def kohya_names(self) -> dict[str, str]:
        """Tensor name in the file -> kohya name, for every LoRA tensor."""
        suffix = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}
        return {key: module + suffix[part] for module, m in self.modules.items() for part, key in m.keys.items()}


def split_key(name: str) -> tuple[str, str] | None:
    """Tensor name -> (kohya module name, part), for every published key style; None for other tensors.

    unet.mid_block.attentions.0.proj_in.lora_A.weight -> (lora_unet_mid_block_attentions_0_proj_in, down).
    """
    for suffix, part in PARTS:
        if name.endswith(suffix):
            return _module_name(name[: -len(suffix)]), part
    return None


def _module_name(path: str) -> str:
    """kohya's name of a module, from its path in any published style."""
    if path.startswith(KOHYA_PREFIXES):
        return path
    for encoder, prefix in TEXT_ENCODERS:
        if path.startswith(encoder):
            return prefix + path.removeprefix(encoder).replace(".", "_")
    path = path.removeprefix("lycoris_")
    while path.startswith(WRAPPERS):
        path = path.removeprefix(next(w for w in WRAPPERS if path.startswith(w)))
    path = path.replace(".processor.", ".")
    path = re.sub(r"\.to_out$", ".to_out.0", path)
    return ("lora_transformer_" if path.startswith(SD3_ROOTS) else "lora_unet_") + path.replace(".", "_")


def header_text(path: Path) -> bytes:
    """A safetensors header's JSON with its padding: 8 bytes are before it, the tensors' after it.

    Raises FileNotFoundError, or ValueError for another format, or a file cut short within its header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}. Check the name; only .safetensors files are read.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = file.read(min(length, size)) if 2 <= length <= 100_000_000 else b""
        # a header's length may begin with the same two bytes as a zip or a pickle, but then "{" follows
        if not text or (head[:2] in (b"PK", b"\x80\x02") and text[:1] != b"{"):
            raise ValueError(
                f"{path.name} is not a .safetensors file, the only kind read (no .ckpt, .pt, .bin): convert it."
            )
    if len(text) < length:
        raise ValueError(f"{path.name} is cut short: {size} bytes, less than its header of {length}. Get it again.")
    return text


def read_header(path: str | Path) -> LoraHeader:
    """Read a safetensors header and check that the file is whole.

    Raises FileNotFoundError, or ValueError for another format, a damaged header, or a file that is cut short.
    """
    path = Path(path)
    text = header_text(path)
    damaged = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, SafetensorError)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {_printable(name): TensorInfo(v["dtype"], tuple(v["shape"])) for name, v in header.items()}
        end = 8 + len(text) + max((v["data_offsets"][1] for v in header.values()), default=0)
        cut_short = path.stat().st_size < end
        if not cut_short:
            with safe_open(path, "pt"):  # it checks names, types, shapes and offsets, and reads no tensor
                pass
    except damaged as error:
        raise ValueError(f"{path.name} has a damaged safetensors header ({brief(error)}). Get it again.") from error
    if cut_short:
        size = path.stat().st_size
        raise ValueError(f"{path.name} is cut short: {size} bytes of the {end} that its header promises. Get it again.")
    return LoraHeader(path, tensors, metadata)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of tensors with numbers that are not finite: with one, every picture is black."""
    floating = ((name, tensor) for name, tensor in tensors if tensor.is_floating_point())
    return [name for name, tensor in floating if not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a floating-point tensor are finite; only one in 8 bits is copied for it."""
    if not tensor.numel():
        return True
    low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return math.isfinite(low) and math.isfinite(high)


def _printable(name: str) -> str:
    """A tensor's name as it is; ValueError for one that would spoil what is printed of it."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a name of {len(name)} characters, {name[:30]!r}, which no tensor has")
    return name


def _number(value: float) -> float:
    """An alpha from JSON, which also has NaN, Infinity and numbers in quotes: ValueError for those."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"an alpha is {str(value)[:30]!r}, which is no number")
    return float(value)


def _read_numbers(path: Path, names: set[str]) -> dict[str, float]:
    """The values of these tensors, which hold one number each."""
    text = header_text(path)
    header = json.loads(text)
    numbers = {}
    with path.open("rb") as file:
        for name in names:
            dtype = DTYPES.get(header[name]["dtype"])
            first, last = header[name]["data_offsets"]
            if dtype is None or last - first != dtype.itemsize:
                kind = f"{header[name]['dtype']} of shape {header[name]['shape']}"
                raise ValueError(f"{path.name}: {name} is {kind}, not one number. Get the file again.")
            file.seek(8 + len(text) + first)
            numbers[name] = torch.frombuffer(bytearray(file.read(last - first)), dtype=dtype).item()
    return numbers


def family_from_metadata(metadata: dict[str, str]) -> str | None:
    """Family by `pcm.recipe`, `modelspec.architecture` or `ss_base_model_version`; None when none tells."""
    if HEADER_KEY in metadata:
        return Recipe.from_header(metadata[HEADER_KEY]).family
    architecture = metadata.get("modelspec.architecture", "")
    for prefix, family in ARCHITECTURES:
        if architecture.startswith(prefix):
            return family
    version = metadata.get("ss_base_model_version", "").lower()
    for mark, family in (("sdxl", "sdxl"), ("sd_1", "sd15"), ("sd_v1", "sd15"), ("sd_2", "sd2"), ("sd3", "sd3")):
        if version.startswith(mark):
            return family
    return None


def family_title(family: str | None) -> str:
    """A family as people write it."""
    return FAMILIES.get(family, "an unknown family") if family else "an unknown family"


def tensor_hash(path: str | Path) -> str:
    """SHA-256 (64 hex) of the bytes after the header: `modelspec.hash_sha256`, AutoV3 by its first 12."""
    with Path(path).open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        return _sha256(file)


def file_hash(path: str | Path) -> str:
    """SHA-256 (64 hex) of the whole file; AutoV2 by its first 10."""
    with Path(path).open("rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
