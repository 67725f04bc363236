"""Mutators of safetensors files: their headers, their metadata and their numbers."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from dataclasses import dataclass

import torch

from .mutators import DEEP, Mutators

SAFETENSORS = Mutators(lambda file: file.with_header(file.header))
# What JSON allows a number to be, and what people and machines write in its place.
ODD = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "1.5", "true", "null", '"8"', "[8]", "{}", '"\\u0000"'),
    *("18446744073709551616", "9223372036854775807", "4611686018427387904", "1e3", "-0", "9" * 5000, '"x"'),
)


@dataclass(frozen=True)
class Tensors:
    """A safetensors file, taken apart: the entries of its header, and the bytes after it."""

    header: dict
    body: bytes

    @classmethod
    def read(cls, data: bytes) -> Tensors:
        length = struct.unpack("<Q", data[:8])[0]
        return cls(json.loads(data[8 : 8 + length]), data[8 + length :])

    def with_header(self, header: dict | str | bytes, length: int | None = None) -> bytes:
        """The file with another header; length: what it claims to have."""
        text = header if isinstance(header, str | bytes) else raw(json.dumps(header))
        text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return struct.pack("<Q", len(text) if length is None else length) + text + self.body

    def changed(self, rng: random.Random, entry: str, value) -> bytes:
        """The file with one entry of one tensor replaced."""
        header = json.loads(json.dumps(self.header))
        header[rng.choice(self.names())][entry] = value
        return self.with_header(header)

    def told(self, key: str, value) -> bytes:
        """The file with an entry in its metadata."""
        return self.with_header(self.header | {"__metadata__": self.header.get("__metadata__", {}) | {key: value}})

    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]


def digest(tensor: torch.Tensor) -> str:
    """Shape, dtype and content."""
    content = bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()[:16]}"


def raw(text: str) -> str:
    """JSON text in which strings such as "@NaN@" stand for what is between the two signs."""
    return re.sub(r'"@([^@]*)@"', lambda m: json.loads(f'"{m[1]}"'), text)


def odd(rng: random.Random) -> str:
    """A stand-in for `raw`."""
    return f"@{rng.choice(ODD)}@"


@SAFETENSORS.add
def header_length(rng, file):
    claims = (0, 1, 2, 2**31, 2**63, 2**64 - 1, 99_999_999, 100_000_001)
    return file.with_header(file.header, length=rng.choice(claims))


@SAFETENSORS.add
def header_length_off_by_some(rng, file):
    return file.with_header(file.header, length=len(json.dumps(file.header)) + rng.choice((-8, -1, 1, 8)))


@SAFETENSORS.add
def header_is_no_table(rng, file):
    return file.with_header(rng.choice(("[]", "5", "null", '"x"', "", " ", "{", "}", "{}", "\ufeff{}", "[" * DEEP)))


@SAFETENSORS.add
def header_in_another_encoding(rng, file):
    return file.with_header(json.dumps(file.header).encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))))


@SAFETENSORS.add
def nested_deep(rng, file):
    deep = "[" * DEEP + "]" * DEEP if rng.random() < 0.5 else '{"a":' * DEEP + "1" + "}" * DEEP
    entry = rng.choice(('"__metadata__": %s', '"x": %s', '"x": {"dtype": "F32", "shape": %s, "data_offsets": [0, 0]}'))
    return file.with_header("{" + entry % deep + "}")


@SAFETENSORS.add
def key_twice(rng, file):
    text, name = json.dumps(file.header), rng.choice(list(file.header))
    return file.with_header(f"{{{json.dumps(name)}: {json.dumps(file.header[name])}, {text[1:]}")


@SAFETENSORS.add
def offsets_odd(rng, file):
    return file.changed(rng, "data_offsets", rng.choice(([0, odd(rng)], [odd(rng), 8], odd(rng), [], [0], [0, 4, 8])))


@SAFETENSORS.add
def offsets_moved(rng, file):
    first, last = file.header[rng.choice(file.names())]["data_offsets"]
    by = rng.choice((-4, 4, 64, len(file.body), 2**62))
    return file.changed(rng, "data_offsets", rng.choice(([first + by, last + by], [last, first], [first, last + by])))


@SAFETENSORS.add
def offsets_of_another(rng, file):
    return file.changed(rng, "data_offsets", file.header[rng.choice(file.names())]["data_offsets"])


@SAFETENSORS.add
def shape_odd(rng, file):
    shape = rng.choice(([odd(rng)], [odd(rng), odd(rng)], odd(rng), [2**40, 2**40], [-4, -8], [2**62], [[4], [8]]))
    return file.changed(rng, "shape", shape)


@SAFETENSORS.add
def shape_of_as_many(rng, file):
    name = rng.choice(file.names())
    shape = file.header[name]["shape"]
    header = json.loads(json.dumps(file.header))
    count = 1
    for side in shape:
        count *= side
    header[name]["shape"] = rng.choice(([count], shape[::-1], [1, *shape], [*shape, 1], [count, 1], [1, count]))
    return file.with_header(header)


@SAFETENSORS.add
def dtype_odd(rng, file):
    kinds = ("F64", "I32", "BF16", "F8_E4M3", "F4", "BOOL", "C64", "U64", "f32", "", "object", odd(rng))
    return file.changed(rng, "dtype", rng.choice(kinds))


@SAFETENSORS.add
def dtype_of_as_many_bytes(rng, file):
    name = rng.choice(file.names())
    as_wide = {"F32": ("I32", "U32"), "F16": ("I16", "BF16", "U16"), "F64": ("I64", "C64"), "I64": ("F64",)}
    header = json.loads(json.dumps(file.header))
    header[name]["dtype"] = rng.choice(as_wide.get(header[name]["dtype"], ("U8",)))
    return file.with_header(header)


@SAFETENSORS.add
def entry_odd(rng, file):
    return file.with_header(file.header | {rng.choice(file.names()): odd(rng)})


@SAFETENSORS.add
def entry_without_a_key(rng, file):
    header = json.loads(json.dumps(file.header))
    entry = header[rng.choice(file.names())]
    del entry[rng.choice(list(entry))]
    return file.with_header(header)


@SAFETENSORS.add
def entry_with_more(rng, file):
    return file.changed(rng, "strides", [1, 1])


@SAFETENSORS.add
def tensor_renamed(rng, file):
    old = rng.choice(file.names())
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha", ".weight", ".lora_A.weight", ".hada_w1_a", ".dora_scale")
    names = ("", "\ud800", "a\0b", "../../x", "x" * 10**6, "\x1b[2J", old.rsplit(".", 1)[0], old + rng.choice(ends))
    new = rng.choice(
        (*names, old.split(".")[0] + rng.choice(ends), old.replace("down", "up"), old.replace("attn", "far"))
    )
    return file.with_header({new if name == old else name: entry for name, entry in file.header.items()})


@SAFETENSORS.add
def tensor_dropped(rng, file):
    """With its bytes, so that the file is a good one that lacks it."""
    return _cut(file, rng.choice(file.names()))


@SAFETENSORS.add
def some_dropped(rng, file):
    word = rng.choice(("alpha", "lora_up", "lora_down", "attn2", "weight"))
    return _cut(file, *(name for name in file.names() if word in name and rng.random() < 0.7))


def _cut(file, *names):
    header, body = {}, b""
    for name, entry in sorted(file.header.items(), key=lambda e: e[1].get("data_offsets", [0])[0]):
        if name not in names and name != "__metadata__":
            first, last = entry["data_offsets"]
            header[name] = entry | {"data_offsets": [len(body), len(body) + last - first]}
            body += file.body[first:last]
        elif name == "__metadata__":
            header[name] = entry
    return Tensors(header, body).with_header(header)


@SAFETENSORS.add
def tensor_emptied(rng, file):
    """A rank, or another side, of 0."""
    name = rng.choice(file.names())
    cut = Tensors.read(_cut(file, name))
    shape = rng.choice(([0], [0, 8], [8, 0], [0, 0], file.header[name]["shape"][:1] + [0]))
    entry = {"dtype": file.header[name]["dtype"], "shape": shape, "data_offsets": [0, 0]}
    return cut.with_header(cut.header | {name: entry})


@SAFETENSORS.add
def rank_of_zero(rng, file):
    name = rng.choice(file.names()).rsplit(".lora", 1)[0]
    cut = Tensors.read(_cut(file, *(n for n in file.names() if n.startswith(name) and "weight" in n)))
    more = {}
    for n in file.names():
        if n.startswith(name) and "weight" in n:
            shape = list(file.header[n]["shape"])
            shape[1 if "up" in n or "lora_B" in n else 0 : 1 + ("up" in n or "lora_B" in n)] = [0]
            more[n] = {"dtype": file.header[n]["dtype"], "shape": shape, "data_offsets": [0, 0]}
    return cut.with_header(cut.header | more)


@SAFETENSORS.add
def many_tensors(rng, file):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    end = rng.choice((".alpha", ".lora_up.weight", ".weight"))
    return file.with_header(file.header | {f"lora_unet_x{i}{end}": entry for i in range(5_000)})


@SAFETENSORS.add
def metadata_odd(rng, file):
    values = (odd(rng), {"a": odd(rng)}, {"a": [1]}, {"a": {"b": "c"}}, {"a": "\ud800"}, {"": ""}, [])
    return file.with_header(file.header | {"__metadata__": rng.choice(values)})


@SAFETENSORS.add
def metadata_huge(rng, file):
    values = {"a": "x" * 3 * 10**6}, {"modelspec.title": "pcm " * 10**5}, {str(i): "x" for i in range(10**4)}
    keys = ("modelspec.title", "ss_output_name", "modelspec.architecture", "ss_base_model_version", "sshs_model_hash")
    more = rng.choice((*values, {rng.choice(keys): rng.choice(("hyper sd ", "1", "lora ")) * 10**5}))
    return file.with_header(file.header | {"__metadata__": more})


@SAFETENSORS.add
def recipe_odd(rng, file):
    recipe = json.loads(file.header.get("__metadata__", {}).get("pcm.recipe", '{"family": "sd15"}'))
    recipe[rng.choice(list(recipe))] = odd(rng)
    return file.told("pcm.recipe", raw(json.dumps(recipe)))


@SAFETENSORS.add
def recipe_out_of_range(rng, file):
    recipe = json.loads(file.header.get("__metadata__", {}).get("pcm.recipe", '{"family": "sd15"}'))
    ranges = {
        "points": (0, -1, 7, 10**30),
        "phases": (0, -4, 10**9),
        "steps": (0, 41, 10**12),
        "shift": (1e-300, 1e300),
    }
    ranges |= {"strength": (1e300, -1), "guidance": (1e300, -5), "sampling_points": (0, 13, 10**9), "gamma": (2, -1)}
    ranges |= {
        "prediction": ("flow", "v"),
        "family": ("sd3", "flux"),
        "mode": ("stochastic",),
        "objective": ("", "x" * 10**5),
    }
    for key in rng.sample(list(ranges), 2):
        recipe[key] = rng.choice(ranges[key])
    return file.told("pcm.recipe", json.dumps(recipe))


@SAFETENSORS.add
def recipe_is_no_table(rng, file):
    return file.told("pcm.recipe", rng.choice(("", "[]", "null", "5", '"x"', "{", "[" * DEEP, "{}", "\0")))


@SAFETENSORS.add
def peft_metadata_odd(rng, file):
    told = {
        "unet.lora_alpha": odd(rng),
        "unet.r": odd(rng),
        "unet.alpha_pattern": odd(rng),
        "unet.use_rslora": odd(rng),
    }
    told = {key: value for key, value in told.items() if rng.random() < 0.6}
    told |= {"unet.alpha_pattern": {"mid_block.attentions.0.proj_in": odd(rng)}} if rng.random() < 0.3 else {}
    text = rng.choice((raw(json.dumps(told)),) * 4 + ("[]", "5", "null", "{", "[" * DEEP))
    bare = Tensors.read(_cut(file, *(n for n in file.names() if n.endswith(".alpha") and rng.random() < 0.8)))
    return bare.told("lora_adapter_metadata", text)


@SAFETENSORS.add
def hints_odd(rng, file):
    keys = (
        "modelspec.architecture",
        "ss_base_model_version",
        "modelspec.prediction_type",
        "sshs_model_hash",
        "ss_steps",
    )
    values = ("", "\0", "\x1b]0;x\x07", "stable-diffusion-xl-v1-base/lora", "sdxl", "v" * 10**5, "EDM", "\u202e")
    return file.told(rng.choice(keys), rng.choice(values))


@SAFETENSORS.add
def numbers_not_finite(rng, file):
    name = rng.choice(file.names())
    entry, body = file.header[name], bytearray(file.body)
    kinds = {"F32": "<f", "F16": "<e", "F64": "<d"}
    if entry["dtype"] in kinds:
        number = struct.pack(kinds[entry["dtype"]], rng.choice((float("nan"), float("inf"), -float("inf"))))
        first, last = entry["data_offsets"]
        at = first + rng.randrange((last - first) // len(number)) * len(number) if last > first else None
        body[at : at + len(number) if at is not None else None] = number if at is not None else body
    return Tensors(file.header, bytes(body)).with_header(file.header)


@SAFETENSORS.add
def numbers_extreme(rng, file):
    """An alpha, or the first number of a weight, of a size that overflows in fp16 or in fp32."""
    name = rng.choice(file.names())
    if file.header[name]["dtype"] != "F32" or not file.body:
        return file.with_header(file.header)
    body, at = bytearray(file.body), file.header[name]["data_offsets"][0]
    body[at : at + 4] = struct.pack("<f", rng.choice((0.0, -1.0, 1e-45, 1e38, 70000.0)))
    return Tensors(file.header, bytes(body)).with_header(file.header)


@SAFETENSORS.add
def body_longer(rng, file):
    return file.with_header(file.header) + rng.randbytes(rng.choice((1, 8, 1000)))


@SAFETENSORS.add
def body_shorter(rng, file):
    return file.with_header(file.header)[: -rng.randrange(1, len(file.body) + 1) if file.body else None]


@SAFETENSORS.add(same=True)
def header_padded(rng, file):
    return file.with_header(json.dumps(file.header) + " " * rng.choice((1, 7, 64, 10_000)))


@SAFETENSORS.add(same=True)
def header_reordered(rng, file):
    names = list(file.header)
    rng.shuffle(names)
    return file.with_header({name: file.header[name] for name in names})


@SAFETENSORS.add(same=True)
def header_written_otherwise(rng, file):
    text = json.dumps(file.header, indent=rng.choice((1, 4)), ensure_ascii=False)
    return file.with_header(text.replace("lora", "\\u006cora") if rng.random() < 0.5 else text)


@SAFETENSORS.add(same=True)
def body_reordered(rng, file):
    names, header, body = file.names(), {}, b""
    rng.shuffle(names)
    for name in names:
        first, last = file.header[name]["data_offsets"]
        header[name] = file.header[name] | {"data_offsets": [len(body), len(body) + last - first]}
        body += file.body[first:last]
    header |= {"__metadata__": file.header["__metadata__"]} if "__metadata__" in file.header else {}
    return Tensors(header, body).with_header(header)


@SAFETENSORS.add(same=True)
def metadata_added(rng, file):
    return file.told(rng.choice(("note", "Ω", "a.b", "x" * 1000)), rng.choice(("", "\U0001f600", "x" * 10**5, "{}")))
