"""`pcm inspect`: what a LoRA file's header says, its hashes, and whether its numbers are finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from ...samplers.lora_file import LoraHeader, file_hash, not_finite, read_header, tensor_hash
from ...samplers.lora_info import facts, sentences
from ...samplers.lora_modules import FLOATS
from ...samplers.texts import printable


def describe(file: Path) -> dict[str, Any]:
    """`facts` of a LoRA's header, its hashes, and the names of its tensors with numbers that are not finite.

    Raises ValueError or FileNotFoundError for a bad file.
    """
    header = read_header(file)
    true_hash, stored = tensor_hash(header.path), header.metadata.get("sshs_model_hash")
    return facts(header) | {
        "sha256": file_hash(header.path),
        "autov3": true_hash[:12],
        "hash_matches_header": None if stored is None else stored == true_hash,
        "not_finite": broken_tensors(header),
    }


def broken_tensors(header: LoraHeader) -> list[str]:
    """The names of a LoRA's tensors with numbers that are not finite, read one by one."""
    with safe_open(header.path, "pt") as file:
        names = [name for name, info in header.tensors.items() if info.dtype in FLOATS]
        return not_finite((name, file.get_tensor(name)) for name in names)


def broken_sentence(names: list[str]) -> str:
    """The defect and its effect, of a file with these tensors that are not finite; the caller adds the advice."""
    return f"numbers in {len(names)} of its tensors are not finite, such as in {names[0]}: every picture is black."


def describe_text(d: dict[str, Any]) -> str:
    """`describe` for people."""
    hashes = {True: "matches", False: "DOES NOT MATCH", None: "is not in"}[d["hash_matches_header"]]
    lines = [d["file"], *(f"  {line}" for line in sentences(d))]
    if broken := d["not_finite"]:
        lines[1:1] = [f"  BROKEN: {broken_sentence(broken)} Get the file again."]
    if d["recipe"]:
        fields = {k: v for k, v in d["recipe"].items() if k != "source" and v not in (None, "")}
        lines.append("  recipe: " + ", ".join(f"{k} {v}" for k, v in fields.items()))
    lines += [f"  SHA256 {d['sha256']}", f"  AutoV3 {d['autov3']}, which {hashes} the header", "  metadata"]
    lines += [f"    {printable(k, 100)}: {printable(v, 100)}" for k, v in sorted(d["metadata"].items())]
    return "\n".join(lines)
