"""One module of a LoRA file by its parts: what kind it is, what it lacks, and which weight it fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FLOATS = frozenset(DTYPES)
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool}

# kind of a module -> its parts that hold weights: of each group, one of the alternatives
KINDS: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "LoRA": ((("down",),), (("up",),)),
    "LoHa": ((("hada_w1_a", "hada_w1_b"),), (("hada_w2_a", "hada_w2_b"),)),
    "LoKr": ((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
    "GLoRA": ((("a1_weight", "a2_weight"),), (("b1_weight", "b2_weight"),)),
    "OFT": ((("oft_blocks",),),),
    "IA3": ((("on_input",),), (("ia3",),)),
    "weights": ((("diff",), ("diff_b",), ("set_weight",), ("w_norm",)),),
}
SCALED = ("LoRA", "LoHa", "LoKr", "GLoRA")  # kinds whose strength is alpha / rank
PLAIN = {"down", "up", "alpha"}  # the parts of a plain LoRA's module
# the parts that make a DoRA of one: the lengths of rows or columns, as ComfyUI and as PEFT call and mean them
MAGNITUDES = {"dora_scale", "magnitude"}
SINGLE = ("alpha", "on_input")  # parts that are one number, and may be an integer


@dataclass
class LoraModule:
    """One adapted module: its tensors' names by part ("down", "up", "alpha", ...), their shapes and their dtypes.

    path: the module's name as it is in the file.
    """

    path: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str | None:
        """One of `KINDS`, by any of its parts; None for a module of which there is but an alpha or the like."""
        for kind, groups in KINDS.items():
            if any(part in self.keys for group in groups for parts in group for part in parts):
                return kind
        return None

    @property
    def title(self) -> str:
        """The kind as people call it: a LoRA with magnitudes is a DoRA, one with a middle a LoCon."""
        if self.kind != "LoRA" or self.is_plain:
            return self.kind or "other"
        return "DoRA" if MAGNITUDES & self.keys.keys() else "LoCon" if "mid" in self.keys else "LoRA with biases"

    @property
    def is_plain(self) -> bool:
        """Whether it is a pair of halves, with or without an alpha, and nothing else."""
        return self.keys.keys() <= PLAIN

    @property
    def is_dora(self) -> bool:
        """Whether it is a pair of halves with PEFT's magnitudes, with or without an alpha and ComfyUI's magnitudes."""
        return "magnitude" in self.keys and self.keys.keys() <= PLAIN | MAGNITUDES

    @property
    def is_integer(self) -> bool:
        """Whether any of its weights is stored in another type than floating point."""
        return any(dtype not in FLOATS for part, dtype in self.dtypes.items() if part not in SINGLE)

    @property
    def lacks(self) -> list[str]:
        """The parts that it needs and has not."""
        groups = KINDS.get(self.kind, ())
        missing = [group[0] for group in groups if not any(set(parts) <= self.keys.keys() for parts in group)]
        return [part for parts in missing for part in parts if part not in self.keys]

    @property
    def rank(self) -> int | None:
        """Rank by the half that has it as its first side; None where there is no such half, or it has no sides."""
        half = next((p for p in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if p in self.shapes), None)
        return next(iter(self.shapes.get(half, ())), None)

    @property
    def is_whole(self) -> bool:
        """Whether both halves are there, (rank, in, ...) and (out, rank, ...), of one rank, in floating point."""
        down, up = (self.shapes.get(part, ()) for part in ("down", "up"))
        return not self.is_integer and len(down) >= 2 and len(up) >= 2 and up[1] == down[0] > 0

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the module is whole, and up @ down has the shape of this weight, (out, in, *kernel)."""
        if not self.is_whole:
            return False
        down, up = self.shapes["down"], self.shapes["up"]
        return up[0] == weight_shape[0] and prod(down[1:]) == prod(weight_shape[1:])
