"""webdataset shards: tar files here or far away, streamed by webdataset's own readers, never whole in memory."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import SEEK_END, BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from torch import Tensor
from webdataset import tariterators
from webdataset.gopen import Pipe, gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from ...samplers.texts import printable
from ..pictures import SUFFIXES
from .buckets import Buckets
from .captions import TEXTS, captions_in, read_text, text_in
from .decoding import has_strange_profile, load_picture
from .listing import is_systems, one_form

PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
CAPTIONS = (*(suffix[1:] for suffix in TEXTS), "json")
# Schemes that webdataset opens with a program that gets the address; "pipe" would run the address itself.
REMOTE = sorted(gopen_schemes.keys() - {"__default__", "pipe"})
MOST = 1 << 28  # bytes of a file in a shard: compressed, a few kilobytes can hold any number of zeros
META = re.compile(r"__[^/]*__($|/)")  # names of files that webdataset keeps for itself in archives
MOST_ENDS = 100  # times that an archive's end is met before reading it is given up
BLOCK = 512  # bytes of tar's blocks; two of zeros end an archive
PATIENCE = 30  # seconds for a server's answer
GONE = (404, 410)  # HTTP status of what is not there
_ENDS = "ends early"
_NO_CAPTION, _NO_PICTURE = 'no caption (.txt, or "caption" in .json)', "no picture"
_ADVICE = "Get the shard again; data.skip_bad=true goes on with what was read"


@dataclass(frozen=True)
class Sample:
    """A picture of a shard, still as its file's bytes, and its caption. problem: why it is no sample, or ""."""

    name: str
    caption: str = ""
    data: bytes = b""
    problem: str = ""

    def load(self, size: int | Buckets) -> tuple[Tensor, Tensor]:
        """The picture as `load_picture` gives it. Raises ValueError for a sample with a problem."""
        if self.problem:
            raise ValueError(self.problem)
        return load_picture(BytesIO(self.data), size)

    def has_strange_profile(self) -> bool:
        """Whether its picture's colour profile counts for nothing."""
        return has_strange_profile(BytesIO(self.data))


def list_shards(patterns: Iterable[str]) -> list[str]:
    """The shards that `data.shards` names, by webdataset's brace expansion: "set-{0000..0012}.tar" are thirteen.

    Raises ValueError for an address that is not read, for a pattern that cannot be expanded, and for one named twice.
    """
    shards: list[str] = []
    for pattern in patterns:
        _check_scheme(pattern)
        try:
            shards += expand_urls(pattern)
        except ValueError as error:
            raise ValueError(
                f"data.shards = {pattern!r} cannot be expanded ({error}). Write it like set-{{0000..0012}}.tar."
            ) from error
    for shard in shards:
        _check_scheme(shard)
    twice = sorted({shard for shard in shards if shards.count(shard) > 1}) if len(set(shards)) < len(shards) else []
    if twice:
        raise ValueError(f"data.shards names {twice[0]} more than once. Name every shard once.")
    return shards


def _check_scheme(shard: str) -> None:
    """Raise ValueError for an address that is not read, and for a command."""
    scheme = _scheme(shard)
    if scheme == "pipe":
        raise ValueError(
            f"data.shards = {shard!r} would run a command, and a configuration runs none. Name files or addresses; "
            "for what only a command can fetch, fetch it first."
        )
    if scheme and scheme not in REMOTE:
        raise ValueError(f"data.shards = {shard!r}: {scheme}: is not read; files and {', '.join(REMOTE)} are.")


def _scheme(shard: str) -> str:
    """The scheme of a shard's address, "" for a file."""
    scheme = urlsplit(shard).scheme
    return "" if scheme == "file" or len(scheme) == 1 else scheme  # a letter is a drive


def local_path(shard: str) -> Path | None:
    """The file of a shard, or None for one that is far away."""
    if _scheme(shard):
        return None
    return Path(url2pathname(urlsplit(shard).path)) if shard.startswith("file:") else Path(shard)


def shard_name(shard: str) -> str:
    """A shard's name for people and headers: the file's alone, without its place or a key in its address."""
    return urlsplit(shard).path.rsplit("/", 1)[-1] if _scheme(shard) else local_path(shard).name


def remote_identity(shard: str) -> tuple[str, str]:
    """(identity, problem) of a remote shard, without reading it.

    identity: the server's words that tell this copy from another: ETag, or length and date; "" where it says
    neither. problem: why it cannot be read, or "".
    """
    if not _scheme(shard).startswith("http"):
        return "", ""
    try:
        with urlopen(Request(shard, method="HEAD"), timeout=PATIENCE) as answer:
            headers = answer.headers
    except HTTPError as error:
        # others (403, 405) may mean that only this question is not answered
        return "", f"the server answers {error.code} {error.reason}" if error.code in GONE else ""
    except OSError as error:
        return "", f"cannot be reached ({getattr(error, 'reason', error)})"
    etag, length, date = (headers.get(key) for key in ("ETag", "Content-Length", "Last-Modified"))
    return etag or (f"{length} {date or ''}".strip() if length else ""), ""


def read_shard(shard: str) -> Iterator[Sample]:
    """The samples of a shard in its order, one in memory at a time.

    Whatever is wrong comes as a sample with a `problem`: at the end one for each without a picture or a caption, and
    a last one where the shard is missing or ends early.
    """
    name = shard_name(shard)
    strange: list[str] = []  # a line for each file that is left out, told at the end
    halves: dict[str, list[str]] = {}  # the problems of samples without a picture or a caption, also told then

    def twice(error: Exception) -> bool:
        strange.append(f"{_words(error).split(': duplicate')[0]} is in it twice: the first is taken")
        return True

    try:
        path = local_path(shard)
        stream = _Watched(gopen(shard) if path is None else path.open("rb"))
        samples = tariterators.group_by_keys(_files(stream, partial(_is_wanted, strange)), handler=twice)
    except Exception as error:  # each of webdataset's openers fails in its own way
        yield Sample(name, problem=f"cannot be opened ({_words(error)}). {_ADVICE}")
        return

    count = 0
    try:
        while isinstance(files := _next(samples), dict):
            count += 1
            sample = _sample(f"{name}/{printable(files['__key__'])}", files)
            if sample.problem in (_NO_CAPTION, _NO_PICTURE):
                halves.setdefault(sample.name, []).append(sample.problem)
            else:
                yield sample
    finally:
        failure = stream.close()

    yield from _told_late(name, halves)
    yield from (Sample(name, problem=line) for line in strange)
    # The program that fetched it knows best, then the archive's reader. The last block shows a cut between two files,
    # which neither of them notices.
    problem = failure or files or ("no end of the archive" if _lacks_end(stream.first, stream.last) else "")
    if problem:
        yield Sample(name, problem=f"{_ENDS}, after {count} sample{'s' * (count != 1)} ({problem}). {_ADVICE}")
    elif not count:
        yield Sample(name, problem="holds no pictures")


def _told_late(name: str, halves: dict[str, list[str]]) -> Iterator[Sample]:
    """The samples without a picture or a caption; those that have both, apart from each other, in one sentence."""
    apart = {key: None for key, problems in halves.items() if {_NO_CAPTION, _NO_PICTURE} <= set(problems)}
    if apart:
        keys = ", ".join(key.rpartition("/")[2] for key in islice(apart, 3)) + ", ..." * (len(apart) > 3)
        yield Sample(
            name,
            problem=f"{len(apart)} pictures stand apart from their captions ({keys}): the files of a sample must stand "
            "together in a tar. Pack it anew, sorted by name (tar --sort=name)",
        )
    for key, problems in halves.items():
        if key not in apart:
            yield from (Sample(key, problem=problem) for problem in problems)


def check_end(shard: str) -> str:
    """The problem of a shard, a file here, whose last block does not end its archive, by reading it; "" for any other.

    Of other shards only the ends are read. A cut shard would be cached a second time once it was whole: so it
    is told before anything is cached.
    """
    try:
        with local_path(shard).open("rb") as file:
            first = file.read(BLOCK)
            file.seek(-min(BLOCK, file.seek(0, SEEK_END)), SEEK_END)
            if not _lacks_end(first, file.read()):
                return ""
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    return next((sample.problem for sample in read_shard(shard) if _ENDS in sample.problem), "")


def _lacks_end(first: bytes, last: bytes) -> bool:
    """Whether these first and last blocks are of a tar that stops short; a compressed one has checks of its own."""
    return first[257:262] == b"ustar" and bool(last.strip(b"\0"))


def _files(stream: _Watched, is_wanted: Callable[[tarfile.TarInfo], bool]) -> Iterator[dict]:
    """The wanted files of an archive, one in memory at a time, as webdataset's own reader gives them."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for info in tar:
            if info.isreg() and is_wanted(info):
                # the name in one form, as an é may be one character in a picture's and two in its caption's
                yield {"fname": one_form(info.name), "data": tar.extractfile(info).read(), "__url__": ""}
            tar.members = []  # or it holds every name
    yield {}  # tells webdataset's grouping that the last sample is complete


def _next(samples: Iterator[dict]) -> dict | str | None:
    """The files of the next sample by kind; a sentence where something went wrong; None at the end."""
    try:
        return next(samples, None)
    except Exception as error:  # tar, its compressions and the programs that fetch fail in their own ways
        return _words(error)


def _words(error: Exception) -> str:
    """An error's message without webdataset's additions."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(next(iter(error.args), error)).split(" @ ")[0]


def _is_wanted(strange: list[str], file: tarfile.TarInfo) -> bool:
    """Whether a file belongs to a sample.

    strange: gets a line for one that is too large, and for a picture whose name has a second dot.
    """
    kind, name = (tariterators.base_plus_ext(file.name)[1] or "").lower(), printable(file.name)
    parts = Path(file.name).parts
    if META.match(file.name) or any(map(is_systems, parts)):
        return False
    if kind.endswith(tuple(f".{known}" for known in PICTURES)):
        strange.append(f"a second dot in the name {name}, which webdataset takes for the kind .{kind}: rename it")
    if kind not in (*PICTURES, *CAPTIONS):
        return False
    if file.size > MOST:
        strange.append(f"{name} has {file.size} bytes: at most {MOST} are read")
    return file.size <= MOST


def _sample(name: str, files: dict) -> Sample:
    """A sample of these files (kind -> bytes), or one with the problem that they have."""
    pictures = [kind for kind in PICTURES if kind in files]
    if len(pictures) != 1:
        return Sample(name, problem=f"several pictures ({', '.join(pictures)})" if pictures else _NO_PICTURE)
    texts = [kind for kind in CAPTIONS if kind in files]
    if not texts:
        return Sample(name, problem=_NO_CAPTION)
    if texts[0] == "json":
        try:
            entry = json.loads(files["json"])
        except (ValueError, RecursionError):
            return Sample(name, problem="not UTF-8 or not JSON: its caption")
        value = text_in(entry) if isinstance(entry, dict) else None
        if not isinstance(value, (str, list)):
            return Sample(name, problem=_NO_CAPTION)
        captions = captions_in(value)
    else:
        captions = read_text(files[texts[0]])
    if captions is None:
        return Sample(name, problem="not UTF-8: its caption")
    if not captions:
        return Sample(name, problem="empty caption")
    return Sample(name, "\n".join(captions), files[pictures[0]])


class _Watched:
    """A stream that keeps its first and last block, as tarfile takes an archive cut between files for a whole one."""

    def __init__(self, stream: BinaryIO | Pipe):
        self.stream, self.first, self.last, self.ends = stream, b"", b"", 0
        # a Pipe's own read drops what the program had sent before it failed
        self._read = stream.stream.read if isinstance(stream, Pipe) else stream.read

    def read(self, size: int) -> bytes:
        data = self._read(size)
        self.ends += not data
        if self.ends > MOST_ENDS:  # tarfile reads on to where a header says that a file ends, however far that is
            raise EOFError("unexpected end of data")
        self.first = (self.first + data[:BLOCK])[:BLOCK]
        self.last = (self.last + data[-BLOCK:])[-BLOCK:]
        return data

    def close(self) -> str:
        """Close it. Returns how the program that fetched it failed, which is known only now, or ""."""
        try:
            self.stream.close()
        except OSError:
            command, *_ = self.stream.args[0]
            return f"{command[0]} ended with {self.stream.status}"
        return ""
