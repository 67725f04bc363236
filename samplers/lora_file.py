"""LoRA files by their safetensors header alone: modules by name, shapes, family, alpha, but no weights."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .file_kinds import kind_of
from .lora_alphas import PEFT_KEY, peft_alphas
from .lora_family import family_by_tensors, family_from_metadata
from .lora_modules import DTYPES, SCALED, SINGLE, LoraModule
from .lora_names import host_suffix, is_encoders, path_of, split_key
from .texts import brief

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # in a folder that PEFT writes
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"  # in one that diffusers writes
LONGEST_CONFIG = 1_000_000  # characters
LONGEST_NAME = 1000  # characters; published ones have up to 120


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it; dtype in its letters, such as "F16"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LoraHeader:
    """A LoRA file as its header describes it.

    config: the text of PEFT's adapter_config.json beside the file, where that is how its alphas are known.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    config: str | None = None

    @property
    def modules(self) -> dict[str, LoraModule]:
        """kohya module name -> module; raises ValueError when the file holds no LoRA, or a weight under two names."""
        if not self._modules:
            examples = ", ".join(list(self.tensors)[:3]) or "no tensors at all"
            raise ValueError(
                f"{self.path.name} holds no LoRA: none of its {len(self.tensors)} tensor names is a LoRA's (they are "
                f"like {examples}). Use a LoRA file, not a checkpoint or an embedding."
            )
        return self._modules

    @property
    def network(self) -> dict[str, LoraModule]:
        """The modules of the network alone, without those of text encoders; raises as `modules`."""
        return {name: module for name, module in self.modules.items() if not is_encoders(name)}

    @cached_property
    def _modules(self) -> dict[str, LoraModule]:
        modules: dict[str, LoraModule] = {}
        for name, (module, part) in self._parts.items():
            entry = modules.setdefault(module, LoraModule(path_of(name, part)))
            if part in entry.keys:
                twice = f"{entry.keys[part]} and {name}"
                raise ValueError(f"{self.path.name} has one weight under two names, {twice}. Get the file again.")
            entry.keys[part] = name
            entry.shapes[part] = self.tensors[name].shape
            entry.dtypes[part] = self.tensors[name].dtype

        # what is left of a module whose weights are of some kind that is not known here is no module
        return {name: module for name, module in modules.items() if module.kind}

    @cached_property
    def _parts(self) -> dict[str, tuple[str, str]]:
        """Tensor name -> (kohya module name, part), for every tensor of a known style."""
        split = {name: parts for name in self.tensors if (parts := split_key(name)) is not None}
        # IA3's weights have names that any weight has: what tells is the flag beside them
        for name in [name for name, (_, part) in split.items() if part == "on_input"]:
            weight = f"{path_of(name, 'on_input')}.weight"
            if weight in self.tensors:
                split[weight] = (split[name][0], "ia3")
        return split

    @property
    def unmatched(self) -> list[str]:
        """Tensor names that belong to no module of a kind known here."""
        return [name for name in self.tensors if self._parts.get(name, ("",))[0] not in self._modules]

    @property
    def family(self) -> str | None:
        """Model family by its tensors, else by its metadata; None when neither tells."""
        return family_by_tensors(self.modules) or family_from_metadata(self.metadata)

    def scale_alphas(self) -> dict[str, float]:
        """module -> alpha, where it is not a tensor but in the PEFT metadata, which the host ignores.

        Raises ValueError for metadata of another form, and for an alpha that is not a finite number.
        """
        text = self.metadata.get(PEFT_KEY) or self.config
        if not text:
            return {}
        try:
            alphas = peft_alphas(text, self.modules)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            source = PEFT_KEY if self.metadata.get(PEFT_KEY) else PEFT_CONFIG
            raise ValueError(
                f"{self.path.name}: its {source} cannot be read ({brief(error)}). Get the file again."
            ) from error
        return {name: alpha for name, alpha in alphas.items() if "alpha" not in self.modules[name].keys}

    @cached_property
    def numbers(self) -> dict[str, dict[str, float]]:
        """module -> its parts that are one number: the alpha, from the file's tensors or the PEFT metadata.

        Reads those few numbers and no other tensor. Raises ValueError for one that is not one number.
        """
        modules, in_metadata = self.modules, self.scale_alphas()
        keys = {m.keys[part] for m in modules.values() for part in SINGLE if part in m.keys}
        values = _read_numbers(self.path, keys)
        numbers = {
            name: {part: values[m.keys[part]] for part in SINGLE if part in m.keys} for name, m in modules.items()
        }
        for name, alpha in in_metadata.items():
            numbers[name]["alpha"] = alpha
        return numbers

    def alphas(self) -> dict[str, float]:
        """module -> alpha, for the modules that have one; raises as `numbers`."""
        return {name: parts["alpha"] for name, parts in self.numbers.items() if "alpha" in parts}

    def lost_alphas(self) -> list[str]:
        """The modules that take an alpha and have none, where others have one, or kohya's entries name one.

        Loaders take such a module at alpha = rank, and diffusers at the others' alpha: whichever it was made for, one
        of them is wrong.
        """
        scaled = [name for name, module in self.modules.items() if module.kind in SCALED]
        lost = [name for name in scaled if "alpha" not in self.numbers[name]]
        try:
            alpha, rank = (float(self.metadata[f"ss_network_{part}"]) for part in ("alpha", "dim"))
        except (KeyError, ValueError):  # none, or "Dynamic" where they differ from module to module
            alpha = rank = 1.0
        return lost if len(lost) < len(scaled) or alpha != rank else []

    def kohya_names(self) -> dict[str, str]:
        """Tensor name in the file -> kohya name, for every tensor of a module."""
        return {key: f"{name}.{host_suffix(p)}" for name, m in self.modules.items() for p, key in m.keys.items()}


def lora_file(path: str | Path) -> Path:
    """The file of a LoRA: where PEFT or diffusers has written a folder, the weights in it."""
    path = Path(path)
    inside = (path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))
    return next((file for file in inside if file.is_file()), path)


def header_text(path: Path) -> bytes:
    """A safetensors header's JSON with its padding: 8 bytes are before it, the tensors' after it.

    Raises FileNotFoundError, or ValueError for another format, or a file cut short within its header.
    """
    path = lora_file(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder without {PEFT_WEIGHTS} (PEFT's) or {DIFFUSERS_WEIGHTS} (diffusers'), so it is no LoRA "
            "of theirs. Name a .safetensors file in it."
        )
    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}. Check the name; only .safetensors files are read.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = file.read(min(length, size)) if 2 <= length <= 100_000_000 else b""
        # a header's length may begin with the same two bytes as a zip or a pickle, but then "{" follows
        if not text or (head[:2] in (b"PK", b"\x80\x02") and text[:1] != b"{"):
            raise ValueError(f"{path.name} {kind_of(path)}")
    if len(text) < length:
        raise ValueError(f"{path.name} is cut short: {size} bytes, less than its header of {length}. Get it again.")
    return text


def read_header(path: str | Path) -> LoraHeader:
    """Read the safetensors header of a file, or of a folder that PEFT or diffusers wrote, and check that it is whole.

    Raises FileNotFoundError, or ValueError for another format, a damaged header, or a file that is cut short.
    """
    path = lora_file(path)
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
    config = path.with_name(PEFT_CONFIG)
    return LoraHeader(path, tensors, metadata, _config_beside(config) if path.name == PEFT_WEIGHTS else None)


def _config_beside(config: Path) -> str | None:
    """The text of PEFT's settings beside its weights, None without any; ValueError for what is no text of theirs."""
    if not config.is_file():
        return None
    try:
        with config.open(encoding="utf-8") as file:
            text = file.read(LONGEST_CONFIG)
        json.loads(text)
        return text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} cannot be read ({brief(error)}). Get it again, or take it away.") from error


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
