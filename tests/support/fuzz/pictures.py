"""Mutators of pictures, and of archives of them."""

from __future__ import annotations

import gzip
import struct
import tarfile
import zlib
from io import BytesIO

from PIL import Image

from .mutators import DEEP, Mutators, flipped

PICTURES = Mutators(bytes)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, content) of each chunk."""
    chunks, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Chunks with right checksums: damage that no checksum tells."""
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _as_png(data: bytes) -> list[tuple[bytes, bytes]]:
    file = BytesIO()
    Image.open(BytesIO(data)).convert("RGB").save(file, "PNG")
    return png_chunks(file.getvalue())


@PICTURES.add
def png_size(rng, data):
    (kind, header), *rest = _as_png(data)
    sides = (0, 1, 2**31 - 1, 2**32 - 1, 65535, 30_000, 12_000, 5)
    return png_of([(kind, struct.pack(">II", rng.choice(sides), rng.choice(sides)) + header[8:]), *rest])


@PICTURES.add
def png_kind(rng, data):
    (kind, header), *rest = _as_png(data)
    return png_of([(kind, header[:8] + rng.randbytes(5)), *rest])


@PICTURES.add
def png_chunk(rng, data):
    first, *rest = _as_png(data)
    bomb = zlib.compress(bytes(rng.choice((10**5, 10**8))))
    kinds = ((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"eXIf", rng.randbytes(50)), (b"tRNS", b"\xff"))
    kinds += ((b"PLTE", b"\0"), (b"acTL", bytes(8)), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"IHDR", bytes(13)))
    return png_of([first, rng.choice(kinds), *rest])


@PICTURES.add
def png_data(rng, data):
    chunks = _as_png(data)
    at = next(i for i, (kind, _) in enumerate(chunks) if kind == b"IDAT")
    datas = (b"", bytes(9), chunks[at][1][:20], zlib.compress(bytes(10**7)), flipped(rng, chunks[at][1]))
    return png_of([*chunks[:at], (b"IDAT", rng.choice(datas)), *chunks[at + 1 :]])


@PICTURES.add
def very_long(rng, data):
    """A line of pixels: enlarged to cover a square frame, it would be a hundred thousand pixels long."""
    return saved(Image.new("RGB", rng.choice(((1, 20_000), (20_000, 1), (1, 60_000), (2, 9_000))), "red"), "PNG")


@PICTURES.add(rare=True)
def very_large(rng, data):
    """Nothing but one colour, which a few kilobytes hold."""
    return saved(
        Image.new(rng.choice(("L", "1", "P")), rng.choice(((9_000, 9_000), (13_000, 13_000), (30_000, 2_000)))), "PNG"
    )


@PICTURES.add
def exif_odd(rng, data):
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 9, 65535, 3))
    out = BytesIO()
    Image.open(BytesIO(data)).convert("RGB").save(
        out, rng.choice(("JPEG", "PNG", "WEBP")), exif=flipped(rng, exif.tobytes())
    )
    return out.getvalue()


@PICTURES.add
def mode_odd(rng, data):
    kind, mode = rng.choice(
        (("PNG", "1"), ("PNG", "LA"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGBA"))
    )
    image = Image.open(BytesIO(data)).convert("RGB")
    return saved(image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode), kind)


@PICTURES.add
def other_kind(rng, data):
    image = Image.open(BytesIO(data)).convert("RGB")
    return saved(image, rng.choice(("GIF", "TIFF", "PPM", "ICO", "TGA", "EPS", "PDF", "BMP", "SGI", "JPEG2000")))


def saved(image: Image.Image, kind: str, **how) -> bytes:
    file = BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


@PICTURES.add(same=True)
def png_text_added(rng, data):
    first, *rest = _as_png(data)
    return png_of([first, (b"tEXt", b"Comment\0" + rng.choice((b"", b"x" * 10_000))), *rest])


@PICTURES.add(same=True)
def written_again(rng, data):
    kind, how = rng.choice((("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("PNG", {"compress_level": 0})))
    return saved(Image.open(BytesIO(data)).convert("RGB"), kind, **how)


# Archives of pictures


def tar_of(entries: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of these files."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return file.getvalue()


def tar_field(data: bytes, at: int, field: bytes) -> bytes:
    """The archive with bytes of its first header replaced, and a right checksum."""
    block = bytearray(data[:512])
    block[at : at + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + data[512:]


TARS = Mutators(tar_of)


@TARS.add
def size_odd(rng, entries):
    sizes = (
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"-0000000001\0",
        b"xxxxxxxxxxx\0",
        b"00000000000\0",
    )
    return tar_field(tar_of(entries), 124, rng.choice(sizes))


@TARS.add
def kind_odd(rng, entries):
    return tar_field(
        tar_of(entries), 156, rng.choice((b"1", b"2", b"3", b"5", b"6", b"x", b"g", b"L", b"S", b"Z", b"\0"))
    )


@TARS.add
def name_odd(rng, entries):
    names = (
        "../../a.png",
        "/a.png",
        "a",
        ".png",
        "a.b.png",
        "a.png/",
        "\udcff.png",
        "a\n.png",
        "x" * 3000 + ".png",
        "a.PNG",
    )
    return tar_of([(rng.choice(names), entries[0][1]), *entries[1:]])


@TARS.add
def caption_odd(rng, entries):
    texts = (
        (".txt", b""),
        (".txt", b"\xff\xfe"),
        (".txt", b"\0"),
        (".json", b"{"),
        (".json", b"[]"),
        (".json", b'{"caption": 5}'),
    )
    texts += (
        (".json", b'{"caption": "\\ud800"}'),
        (".json", b"[" * DEEP),
        (".json", b'{"caption": ' + b"9" * 5000 + b"}"),
    )
    end, text = rng.choice((*texts, (".txt", b"x" * 10**6)))
    return tar_of([entries[0], (entries[0][0].rsplit(".")[0] + end, text), *entries[2:]])


@TARS.add
def picture_odd(rng, entries):
    return tar_of([(entries[0][0], PICTURES.draw(rng, entries[0][1]).data), *entries[1:]])


@TARS.add
def doubled(rng, entries):
    return tar_of([*entries, *rng.choice((entries, entries[:1], entries[::-1]))])


@TARS.add
def compressed_and_cut(rng, entries):
    data = gzip.compress(tar_of(entries))
    return data[: rng.randrange(20, len(data))]


@TARS.add(rare=True)
def bomb(rng, entries):
    """A picture of half a gigabyte of zeros, in half a megabyte."""
    return gzip.compress(tar_of([("z.png", bytes(1 << 29)), ("z.txt", b"z")]), 1)


@TARS.add(same=True)
def in_another_form(rng, entries):
    data = tar_of(entries, rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    return gzip.compress(data) if rng.random() < 0.5 else data
