"""Cached latents and prompt encodings: made once, fingerprinted, packed in files that `store` reads.

A cache is a folder named by the fingerprint of everything that decides its content. Each file is written
whole or not at all, so an interrupted caching goes on where it stopped. A picture's latent is kept as the
VAE's mean and standard deviation, so each visit of the picture draws a fresh latent from them; the teacher's
own latents have no spread. First come the latents, shared out over the processes; then the first process
writes the index, from which it is known which prompts there are; then these are encoded, shared out again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...samplers import PhaseGrid
from ...samplers.lora_file import read_header
from ..config.config import Config
from ..config.sections import DataConfig
from ..families import Base, Condition
from ..families.generate import generate
from ..system.files import write_tensors
from .buckets import Buckets, buckets_for
from .index import STRANGE, count_texts, is_whole, latents_name, pieces_there, texts_of, write_index
from .prompts import prompts_of
from .reading import ahead, stop_or_skip
from .sources import Source, open_source
from .store import FORMAT, INDEX, PROMPTS, SHARD, TEXTS, LatentCache, prompts_name, reading
from .tags import Tags

TEACHER = PhaseGrid(points=1000, phases=1)
# A base's reading is tried on latents made in so many steps, where they have a smaller standard deviation than this.
TRIAL_STEPS, PLAUSIBLE_STD = 10, 4.0
# What a file of encodings says of its prompts: how many of them are cut short.
CUT = "cut"
# Called with what is cached, how many of it are done, and of how many.
Progress = Callable[[str, int, int], None]


class Share(NamedTuple):
    """The part of the work that one of several processes does."""

    rank: int = 0
    processes: int = 1

    def of(self, numbers: Iterable[int]) -> Iterator[int]:
        """The numbers whose work is this process's."""
        return (number for number in numbers if number % self.processes == self.rank)


def build_cache(
    config: Config,
    base: Base,
    progress: Progress,
    rank: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> LatentCache:
    """Make what is missing of the run's cache and open it.

    progress(what, done, total) is called as it goes. Each process makes its share; wait() returns in each
    once all have called it. Raises ValueError that lists every unreadable picture and missing caption, unless
    `data.skip_bad`.
    """
    data, share = config.data, Share(rank, processes)
    buckets = buckets_for(data.buckets, data.resolution, base.latent_shape) if data.buckets else None

    # The first process goes ahead: it takes the files' hashes, which are then there for the others, and
    # deletes what is damaged before anyone counts what is there.
    if rank > 0:
        wait()
    source = open_source(config, buckets, write=rank == 0) if data.has_pictures else None
    prompts = None if source else prompts_of(config)
    content = _content(config, base, buckets, source.identity if source else prompts)
    folder = config.cache_folder / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    damaged = _drop_damaged(folder) if rank == 0 else []
    parts = len(source.parts) if source else -(-(len(prompts) if config.objective.matching else data.count) // SHARD)
    lacking = _lacking(folder, parts)
    if rank == 0:
        if lacking:
            (folder / INDEX).unlink(missing_ok=True)  # what is made again may be other than it was
        wait()

    missing = list(share.of(lacking))
    bad: list[str] = []
    if source:
        bad = _cache_pictures(folder, base, data, source, buckets or data.resolution, missing, progress)
    elif config.objective.matching:
        _cache_no_latents(folder, base, data.resolution, prompts, missing)
    elif missing:
        _cache_teacher_latents(folder, base, config, prompts, missing, progress)
    wait()
    _check_whole(folder, parts, bad, source)

    # The index numbers the prompts, and the files of their encodings go by these numbers: so it comes before them.
    if rank == 0 and not ((folder / INDEX).is_file() and (folder / TEXTS).is_file()):
        write_index(folder, buckets, listed=isinstance(data.buckets, tuple), choice=data.captions, tags=Tags.of(data))
    wait()
    _cache_prompts(folder, base, data.batch_size, share, progress)
    wait()

    skipped, notes = (source.skipped, source.notes) if source else ((), ())
    cache = LatentCache(folder, skipped, [*damaged, *notes, *_cut_note(folder, base)])
    if not len(cache):
        some = "; ".join(cache.skipped[:10])
        raise ValueError(f"None of {source.name} can be used: {some}.")
    if previews := list(config.preview.prompts):
        cache.add_prompts(previews, _encode(base, previews))
    return cache


def _drop_damaged(folder: Path) -> list[str]:
    """Delete the cache's files that are cut short or have a damaged header, so that they are made again.

    Returns a sentence on each.
    """
    notes = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except ValueError as error:
            notes.append(f"{str(error).removesuffix(' Get it again.').rstrip('.')}: it is made again")
            path.unlink()
    return notes


def _lacking(folder: Path, parts: int) -> list[int]:
    """The numbers of the parts that are not, or not wholly, in the folder."""
    pieces = pieces_there(folder)
    return [number for number in range(parts) if not is_whole(pieces.get(number, {}))]


def _content(config: Config, base: Base, buckets: Buckets | None, identity: list[Any]) -> dict[str, Any]:
    """All that decides what is in a cache; its hash names the folder.

    identity: what tells the pictures from others, or the prompts of which the teacher makes latents.
    """
    data = config.data
    content = {"format": FORMAT, "base": base.weights_hash, "encoders": base.encoder_settings}
    content |= {"size": buckets or data.resolution, "data": identity}
    if data.has_pictures:
        content |= {"captions": data.captions}
        if tags := Tags.of(data):
            content |= {"tags": list(tags)}
    elif config.objective.matching:
        content |= {"latents": "none", "prediction": base.prediction, "schedule": base.schedule_settings}
    else:
        content |= {"steps": data.teacher_steps, "guidance": data.teacher_guidance, "null": base.null}
        content |= {"prediction": base.prediction, "schedule": base.schedule_settings}
        content |= {"count": data.count, "batch": data.batch_size, "dtype": config.base.dtype}
    return content


def _check_whole(folder: Path, parts: int, bad: list[str], source: Source | None) -> None:
    """Raise ValueError for the bad items that kept a piece from being written, and for those of another process."""
    lacking = _lacking(folder, parts)
    if lacking:
        stop_or_skip(bad, False, f"{len(bad)} of {source.name} cannot be used")
        raise ValueError(
            f"{len(lacking)} of {parts} parts of the cache are not there: another process found pictures that cannot "
            "be used, and its own message names them; or it has written to another disk: data.cache must be shared."
        )


@dataclass
class Piece:
    """The pictures that become one file of latents; they wait here, by size, until there is a batch of them."""

    base: Base
    batch: int
    captions: list[str] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    frames: list[tuple[int, ...]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    strange_profiles: int = 0
    waiting: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    latents: dict[tuple[int, ...], list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)

    def add(self, caption: str, pixels: Tensor, sizes: Tensor) -> None:
        """Take a picture (3, H, W) with its caption and its sizes (6,), and encode a batch once there is one."""
        frame = tuple(pixels.shape[1:])
        self.captions.append(caption)
        self.sizes.append(sizes)
        self.frames.append(frame)
        self.waiting.setdefault(frame, []).append(pixels)
        if len(self.waiting[frame]) == self.batch:
            self._encode(frame)

    def _encode(self, frame: tuple[int, ...]) -> None:
        """Encode the waiting pictures of this height and width. Mean and spread are kept: no latent is drawn yet."""
        mean, std = self.base.encode_images(torch.stack(self.waiting.pop(frame)))
        encoded = mean.half().cpu(), None if std is None else std.half().cpu()
        self.latents.setdefault(frame, []).append(encoded)

    def write(self, path: Path) -> None:
        """Encode what still waits and write the file."""
        for frame in list(self.waiting):
            self._encode(frame)
        tensors, shapes = {}, {}
        for frame in sorted(self.latents):
            means, stds = zip(*self.latents[frame], strict=True)
            shapes[frame] = "x".join(map(str, means[0].shape[2:]))
            tensors[f"mean.{shapes[frame]}"] = torch.cat(means)
            if stds[0] is not None:
                tensors[f"std.{shapes[frame]}"] = torch.cat(stds)
        if self.sizes:
            order = list(shapes)
            tensors["sizes"] = torch.stack(self.sizes)
            tensors["shape"] = torch.tensor([order.index(frame) for frame in self.frames], dtype=torch.int16)
        write_latents(path, tensors, list(shapes.values()), self.captions, self.bad, self.strange_profiles)


def write_latents(
    path: Path,
    tensors: dict[str, Tensor],
    shapes: list[str],
    captions: list[str],
    skipped: list[str],
    strange_profiles: int = 0,
) -> None:
    """Write one file of latents.

    tensors: "mean.<shape>" (n, C, h, w) and perhaps "std.<shape>" for each of the shapes ("64x64"), and for
    each caption, in order, its row of "sizes" (6) and the number of its "shape". strange_profiles: how many of the
    pictures have a colour profile that counted for nothing.
    """
    facts = {"captions": captions, "shapes": shapes, "skipped": skipped, STRANGE: strange_profiles}
    write_tensors(path, tensors, {key: json.dumps(value) for key, value in facts.items()})


def _cache_pictures(
    folder: Path,
    base: Base,
    data: DataConfig,
    source: Source,
    size: int | Buckets,
    parts: Iterable[int],
    progress: Progress,
) -> list[str]:
    """Encode the pictures of these parts. Returns the bad ones that kept their piece from being written."""

    def load(item):
        try:
            return item, item.load(size), item.has_strange_profile()
        except ValueError as error:
            return item, error, False

    bad: list[str] = []
    for number in parts:
        part, written = source.parts[number], pieces_there(folder).get(number, {})
        items = iter(part.items())
        item = next(items, None)
        index = seen = 0
        while item is not None:
            piece = Piece(base, data.batch_size)
            chunk = chain([item], islice(items, SHARD - 1))
            # a stream can only be gone through, but the pictures of a piece that is there are not looked at
            loads = zip(chunk, repeat(None), repeat(False)) if index in written else ahead(load, chunk, data.workers)
            for item, loaded, strange in loads:
                seen += 1
                if isinstance(loaded, ValueError):
                    piece.bad.append(f"{item.name}: {loaded}")
                elif loaded:
                    piece.add(item.caption, *loaded)
                    piece.strange_profiles += strange
                if loaded and seen % data.batch_size == 0:
                    progress(source.what, part.start + min(seen, part.length), source.total)

            item = next(items, None)  # looked at before the piece is written, whose name says whether it is the last
            bad += [] if data.skip_bad else piece.bad
            if index not in written and (data.skip_bad or not piece.bad):
                piece.write(folder / latents_name(number, index, last=item is None))
            index += 1
        if seen % data.batch_size:
            progress(source.what, part.start + part.length, source.total)
    return bad


def _cache_teacher_latents(
    folder: Path, base: Base, config: Config, prompts: list[str], parts: Iterable[int], progress: Progress
) -> None:
    """Make the teacher's own latents: DDIM with guidance, from noise that depends only on the sample's number.

    Raises RuntimeError for latents that are not finite, and as `_check_reading`.
    """
    data = config.data
    null = base.null_condition(base.encode_prompts([""]))
    ticks = TEACHER.plan(data.teacher_steps).ticks
    side = data.resolution
    shape = base.latent_shape(side)
    _check_reading(base, prompts[:2], shape)
    name = "x".join(map(str, shape[1:]))

    for part in parts:
        start, end = part * SHARD, min((part + 1) * SHARD, data.count)
        captions = [prompts[i % len(prompts)] for i in range(start, end)]
        batches = range(start, end, data.batch_size)
        # all prompts first, so that encoders and network take turns on the device once
        texts = [captions[at - start : at - start + data.batch_size] for at in batches]
        encodings = [{k: v.cpu() for k, v in base.encode_prompts(batch).items()} for batch in texts]

        latents = []
        for at, encoding in zip(batches, encodings, strict=True):
            numbers = range(at, min(at + data.batch_size, end))
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in numbers])
            condition = {k: v.to(base.device) for k, v in encoding.items()}
            x0 = generate(base, condition, null, noise, ticks, data.teacher_guidance)
            if not x0.isfinite().all():
                which = f"The teacher's latents for samples {at} to {numbers[-1]}"
                raise RuntimeError(f"{which} are not finite. Set base.dtype=fp32, and check the base.")
            latents.append(x0.half().cpu())
            progress("teacher's latents", numbers[-1] + 1, data.count)

        tensors = {f"mean.{name}": torch.cat(latents)} | _of_squares(side, len(captions))
        write_latents(folder / latents_name(part, 0, last=True), tensors, [name], captions, [])


def _of_squares(side: int, count: int) -> dict[str, Tensor]:
    """Sizes and shape numbers of as many square pictures that nothing was cropped of."""
    sizes = torch.tensor([side, side, 0, 0, side, side]).repeat(count, 1)  # original, top and left, of the result
    return {"sizes": sizes, "shape": torch.zeros(count, dtype=torch.int16)}


def _cache_no_latents(folder: Path, base: Base, side: int, prompts: list[str], parts: Iterable[int]) -> None:
    """Write the samples of a run that makes its own from noise: a prompt each, without a latent.

    Raises as `_check_reading`.
    """
    shape = base.latent_shape(side)
    if parts:
        _check_reading(base, prompts[:2], shape)
    for part in parts:
        captions, name = prompts[part * SHARD : (part + 1) * SHARD], latents_name(part, 0, last=True)
        write_latents(folder / name, _of_squares(side, len(captions)), ["x".join(map(str, shape[1:]))], captions, [])


@torch.no_grad()
def teacher_trial(base: Base, condition: Condition, shape: tuple[int, int, int]) -> Tensor:
    """A few latents (B, C, h, w) of the base as it stands, in few steps and without guidance, the same at each call."""
    # not the noise that check_prediction will add, which would cancel against what is left of it in these latents
    count = len(next(iter(condition.values())))
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    return generate(base, condition, condition, noise, TEACHER.plan(TRIAL_STEPS).ticks)


@torch.no_grad()
def _check_reading(base: Base, prompts: list[str], shape: tuple[int, int, int]) -> None:
    """Raise ValueError for a base that is read as eps and predicts v, or the other way round, before it makes
    latents that mean nothing.

    Latents made under the wrong reading fit neither, so the trial is on some that the other reading makes:
    they are good only where that one is right, and far from a standard deviation of 1 where it is not.
    """
    other = base.misread()
    if other is None:
        return
    condition = base.encode_prompts(prompts)
    x0 = teacher_trial(other, condition, shape)
    if x0.std() < PLAUSIBLE_STD:
        base.check_prediction(x0, condition)


def _cache_prompts(folder: Path, base: Base, batch: int, share: Share, progress: Progress) -> None:
    """Encode the prompts of this process's share whose encodings are not there, `batch` at a time."""
    total = count_texts(folder)
    for number in share.of(range(-(-total // SHARD))):
        path = folder / prompts_name(number)
        if path.is_file():
            continue
        start = number * SHARD
        prompts = list(texts_of(folder, start, min(start + SHARD, total)))
        encodings: list[dict[str, Tensor]] = []
        cut = base.count_cut(prompts)
        for at in range(0, len(prompts), batch):
            encodings.append(_encode(base, prompts[at : at + batch]))
            progress("prompts", start + min(at + batch, len(prompts)), total)
        write_tensors(path, {k: torch.cat([e[k] for e in encodings]) for k in encodings[0]}, {CUT: str(cut)})


def _cut_note(folder: Path, base: Base) -> list[str]:
    """A sentence on the prompts that the text encoders do not read to their ends, where there are any."""
    cut = 0
    for path in folder.glob(PROMPTS):
        with reading(path):
            cut += int(read_header(path).metadata[CUT])
    if not cut:
        return []
    return [
        f"{cut} of the {count_texts(folder) - 1} different captions are longer than the text encoder reads, which is "
        f"{max(base.token_limits)} tokens with the marks of start and end: the rest of each counts for nothing"
    ]


def _encode(base: Base, prompts: list[str]) -> dict[str, Tensor]:
    """The prompts' encodings (B, ...) as they are cached: in fp16, on the CPU."""
    return {k: v.half().cpu() for k, v in base.encode_prompts(prompts).items()}
