"""Mutators of configurations: TOML files, and overrides on the command line."""

from __future__ import annotations

from .mutators import DEEP, Mutators

TOML = Mutators(str.encode)
VALUES = (
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1",
        "0",
        "1e-320",
        "true",
        "''",
        '"\\u0000"',
        "1979-05-27",
        "[]",
        "{}",
        "[[[]]]",
    ),
    *(
        "9" * 5000,
        "18446744073709551616",
        '"x"',
        "[1, 'a', {}]",
        "{a = 1}",
        "'''\n'''",
        "0x10",
        '"' + "x" * 10**5 + '"',
    ),
)


def _lines(text: str) -> list[str]:
    return text.splitlines()


@TOML.add
def value_odd(rng, text):
    lines = _lines(text)
    at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
    lines[at] = lines[at].split("=")[0] + "= " + rng.choice(VALUES)
    return "\n".join(lines).encode()


@TOML.add
def key_misspelt(rng, text):
    lines = _lines(text)
    at = rng.randrange(len(lines))
    lines[at] = lines[at].replace(rng.choice("aeiou"), rng.choice(("", "x", "é", "-", ".")), 1)
    return "\n".join(lines).encode()


@TOML.add
def line_doubled(rng, text):
    lines = _lines(text)
    at = rng.randrange(len(lines))
    return "\n".join([*lines[:at], lines[at], *lines[at:]]).encode()


@TOML.add
def line_dropped(rng, text):
    lines = _lines(text)
    del lines[rng.randrange(len(lines))]
    return "\n".join(lines).encode()


@TOML.add
def lines_moved(rng, text):
    lines = _lines(text)
    rng.shuffle(lines)
    return "\n".join(lines).encode()


@TOML.add
def nested(rng, text):
    depth = rng.choice((20, 400, 2_000, DEEP))
    deep = ("[" * depth + "]" * depth, "{a=" * depth + "1" + "}" * depth, "1")
    key = rng.choice(("train", "x", "base", "train.steps", ".".join("a" * min(depth, 2_000))))
    return f"{key} = {rng.choice(deep)}\n{text}".encode()


@TOML.add
def tables(rng, text):
    header = rng.choice(
        ("[[train]]", "[train.steps.x]", "[objective]\nname = 'x'", "[" + ".".join("a" * 2_000) + "]", "[]")
    )
    return f"{text}\n{header}\n".encode()


@TOML.add
def section_is_a_value(rng, text):
    name = rng.choice(("train", "base", "objective", "preview", "preset", "data", "name", "output"))
    return f"{name} = {rng.choice(VALUES)}\n{text}".encode()


@TOML.add
def objective_odd(rng, text):
    value = rng.choice((*VALUES, "'lcm'", "'PCM'", "'ct'", "['pcm']"))
    key = rng.choice(("name", "points", "guidance", "phases", "solver", "huber_c", "points.x"))
    return f"{text}\n[objective]\n{key} = {value}\n".encode()


@TOML.add(rare=True)
def many_keys(rng, text):
    keys = "\n".join(f"k{i} = {i}" for i in range(DEEP))
    return (f"{keys}\n{text}" if rng.random() < 0.5 else f"{text}\n[train]\n{keys}").encode()


@TOML.add
def in_another_encoding(rng, text):
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-16-le"))) + rng.choice((b"", b"\xff\xfe", b"\0"))


@TOML.add(same=True)
def commented(rng, text):
    return "\n".join(f"  {line}  # {rng.choice(('x', 'é', '=', '[a]'))}" for line in _lines(text)).encode()


@TOML.add(same=True)
def written_on_windows(rng, text):
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()


OVERRIDES = (
    *("train.steps", "=1", "=", "a..b=1", ".=1", "train.steps.x=1", "train=5", "base=x", "base.path=\0", "base.path="),
    *(
        "train.lr=nan",
        "train.lr=1e400",
        "train.steps=1e400",
        f"train.steps={'9' * 5000}",
        "train.steps=[",
        "train.steps={",
    ),
    *(
        "objective=5",
        "objective.name=5",
        "objective.name=[]",
        "objective.name=pcmm",
        "objective.guidance=[1]",
        "preset=x",
    ),
    *("data.buckets=[[]]", "data.buckets=['0x0']", "data.shards=5", "preview.steps=[]", "preview.steps=5", "name=../x"),
    *("name=\n", f"{'a.' * 3000}a=1", f"train.steps={'[' * 3000}", "train.stepss=2", "lora.rank=1.5", "lora={rank=4}"),
    *(
        "train.steps=1979-05-27",
        "train.steps='x'",
        "name=\ud800",
        "train.seed=-1",
        "train.ema=true",
        "base.path=\x1b[2J",
    ),
)
