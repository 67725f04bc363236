"""Cached latents and prompt encodings: made once, fingerprinted, packed in shards, read by row.

A cache is a folder named by the fingerprint of everything that decides its content. Each shard is written whole or not
at all, so an interrupted caching goes on where it stopped. Latents keep the VAE's mean and standard deviation, so each
visit of a picture draws a fresh latent; the teacher's own latents have no spread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...samplers import PhaseGrid
from ..checkpoint import write_tensors
from ..config import Config
from ..families import Base, bundled_folder
from ..generate import generate
from . import Digit, Picture, pictures_of, read_prompts, stop_or_skip

SHARD = 256
TEACHER = PhaseGrid(points=1000, phases=1)
# Of the two latents on which a base's reading is tried: the teacher's steps, and a spread that no scaled latents have.
TRIAL_STEPS, PLAUSIBLE_STD = 10, 4.0
Pictures = list[Picture] | list[Digit]
Progress = Callable[[str, int, int], None]


class LatentCache:
    """The cached samples of one run: `captions`, `skipped`, and latents, sizes and encodings by index or prompt."""

    def __init__(self, folder: Path, skipped: Iterable[str] = ()):
        self.folder = folder
        self.shards = [safe_open(f, "pt") for f in sorted(folder.glob("latents-*.safetensors"))]
        details = [s.metadata() for s in self.shards]
        self.captions = [c for d in details for c in json.loads(d["captions"])]
        self.skipped = [*skipped, *(line for d in details for line in json.loads(d["skipped"]))]
        self._row = [(i, j) for i, d in enumerate(details) for j in range(len(json.loads(d["captions"])))]
        self._prompts = safe_open(folder / "prompts.safetensors", "pt")
        self._prompt_row = {p: i for i, p in enumerate(json.loads(self._prompts.metadata()["prompts"]))}
        self._keys = list(self._prompts.keys())
        self._more: dict[str, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.captions)

    def latents(self, indices: Iterable[int], generator: torch.Generator) -> Tensor:
        """(B, C, h, w) latents in fp32, drawn from their posteriors where they have one."""
        rows = []
        for index in indices:
            shard, row = self._row[index]
            mean = self.shards[shard].get_slice("mean")[row].float()
            if "std" in self.shards[shard].keys():  # noqa: SIM118 (a safetensors file, not a dict)
                spread = self.shards[shard].get_slice("std")[row].float()
                mean = mean + spread * torch.randn(mean.shape, generator=generator)
            rows.append(mean)
        return torch.stack(rows)

    def sizes(self, indices: Iterable[int]) -> Tensor:
        """(B, 6) of each sample: see `load_picture`."""
        places = (self._row[index] for index in indices)
        return torch.stack([self.shards[shard].get_slice("sizes")[row] for shard, row in places])

    def encoding(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Prompt encodings (B, ...) in fp32; the prompts must have been cached or added."""
        return {k: torch.stack([self._encoded(k, p) for p in prompts]).float() for k in self._keys}

    def add_prompts(self, prompts: list[str], encoded: dict[str, Tensor]) -> None:
        """Know the encodings of prompts that are no sample's (a preview's) too, without writing them down."""
        self._more |= {p: {k: v[i] for k, v in encoded.items()} for i, p in enumerate(prompts)}

    def _encoded(self, key: str, prompt: str) -> Tensor:
        if prompt in self._prompt_row:
            return self._prompts.get_slice(key)[self._prompt_row[prompt]]
        return self._more[prompt][key]


def build_cache(config: Config, base: Base, progress: Progress) -> LatentCache:
    """Make what is missing of the run's cache and open it.

    progress(what, done, total) is called as it goes. Raises ValueError that lists every unreadable picture and missing
    caption, unless `data.skip_bad`.
    """
    data = config.data
    pictures, skipped = pictures_of(data.images, data.count, data.skip_bad) if data.images else (None, [])
    prompts = (
        read_prompts(data.prompts or own_prompts(config.base.path))[: data.count]
        if pictures is None
        else sorted({p.caption for p in pictures})
    )
    folder = config.cache_folder / _fingerprint(config, base, pictures, prompts)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    _cache_prompts(folder, base, ["", *dict.fromkeys(prompts)], data.batch_size, progress)
    if pictures is not None:
        _cache_pictures(folder, base, config, pictures, progress)
    else:
        _cache_teacher_latents(folder, base, config, prompts, progress)
    cache = LatentCache(folder, skipped)
    if not len(cache):
        some = "; ".join(cache.skipped[:10])
        raise ValueError(f"None of the {len(pictures)} pictures in {data.images} can be used: {some}.")
    if previews := list(config.preview.prompts):
        cache.add_prompts(previews, _encode(base, previews))
    return cache


def own_prompts(base: str) -> str | None:
    """The prompt file that comes with a bundled tiny base, whose language is not that of the default list."""
    folder = bundled_folder(base)
    return str(folder / "prompts.txt") if folder else None


def _fingerprint(config: Config, base: Base, pictures: Pictures | None, prompts: list[str]) -> str:
    data = config.data
    content = {"base": base.base_hash, "encoders": base.encoder_settings}
    content |= {"resolution": data.resolution, "prompts": prompts}
    if pictures is None:
        content |= {"steps": data.teacher_steps, "guidance": data.teacher_guidance, "null": base.null}
        content |= {"prediction": base.prediction, "schedule": base.schedule_settings}
        content |= {"count": data.count, "batch": data.batch_size, "dtype": config.base.dtype}
    else:
        content["pictures"] = [(p.content(), p.caption) for p in pictures]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cache_prompts(folder: Path, base: Base, prompts: list[str], batch: int, progress: Progress) -> None:
    path = folder / "prompts.safetensors"
    if path.is_file():
        return
    encodings: list[dict[str, Tensor]] = []
    for at in range(0, len(prompts), batch):
        encodings.append(_encode(base, prompts[at : at + batch]))
        progress("prompts", min(at + batch, len(prompts)), len(prompts))
    packed = {k: torch.cat([e[k] for e in encodings]) for k in encodings[0]}
    write_tensors(path, packed, {"prompts": json.dumps(prompts)})


def _encode(base: Base, prompts: list[str]) -> dict[str, Tensor]:
    return {k: v.half().cpu() for k, v in base.encode_prompts(prompts).items()}


def _cache_pictures(folder: Path, base: Base, config: Config, pictures: Pictures, progress: Progress) -> None:
    data, bad = config.data, []
    for path, start in _missing_shards(folder, len(pictures)):
        means, stds, sizes, captions, bad_here = [], [], [], [], []
        for at in range(start, min(start + SHARD, len(pictures)), data.batch_size):
            pixels = []
            for picture in pictures[at : min(at + data.batch_size, start + SHARD)]:
                try:
                    picture_pixels, picture_sizes = picture.load(data.resolution)
                    pixels.append(picture_pixels)
                    sizes.append(picture_sizes)
                    captions.append(picture.caption)
                except ValueError as error:
                    bad_here.append(f"{picture.name}: {error}")
            if pixels:
                mean, std = base.encode_images(torch.stack(pixels))
                means.append(mean.half().cpu())
                if std is not None:
                    stds.append(std.half().cpu())
            progress("pictures", min(at + data.batch_size, len(pictures)), len(pictures))
        bad += bad_here
        if bad_here and not data.skip_bad:
            continue
        tensors = {"mean": torch.cat(means), "sizes": torch.stack(sizes)} if means else {}
        if stds:
            tensors["std"] = torch.cat(stds)
        _write_shard(path, tensors, captions, bad_here)
    stop_or_skip(bad, data.skip_bad, f"of the {len(pictures)} pictures in {data.images} cannot be used")


def _cache_teacher_latents(folder: Path, base: Base, config: Config, prompts: list[str], progress: Progress) -> None:
    """The teacher's own pictures: DDIM with guidance from noise that depends only on the sample's number."""
    data = config.data
    null = base.null_condition(base.encode_prompts([""]))
    ticks = TEACHER.plan(data.teacher_steps).ticks
    shape, side = base.latent_shape(data.resolution), data.resolution
    _check_reading(base, prompts[:2], shape)
    for path, start in _missing_shards(folder, data.count):
        end = min(start + SHARD, data.count)
        captions = [prompts[i % len(prompts)] for i in range(start, end)]
        latents = []
        for at in range(start, end, data.batch_size):
            numbers = range(at, min(at + data.batch_size, end))
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in numbers])
            condition = base.encode_prompts([captions[i - start] for i in numbers])
            x = generate(base, condition, null, noise, ticks, data.teacher_guidance)
            if not x.isfinite().all():
                which = f"The teacher's latents for samples {at} to {numbers[-1]}"
                raise RuntimeError(f"{which} are not finite. Set base.dtype=fp32, and check the base.")
            latents.append(x.half().cpu())
            progress("teacher's latents", numbers[-1] + 1, data.count)
        sizes = torch.tensor([side, side, 0, 0, side, side]).repeat(len(captions), 1)
        _write_shard(path, {"mean": torch.cat(latents), "sizes": sizes}, captions, [])


@torch.no_grad()
def _check_reading(base: Base, prompts: list[str], shape: tuple[int, int, int]) -> None:
    """Raise ValueError for a base that predicts the other of eps and v, before it makes latents that mean nothing.

    Latents made under the wrong reading fit neither, so the trial is on some that the other reading makes: they are
    good only where that one is right, and far from a standard deviation of 1 where it is not.
    """
    other = base.misread()
    if other is None:
        return
    condition = base.encode_prompts(prompts)
    # not the noise that check_prediction will add, which would cancel against what is left of it in these latents
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(1))
    x0 = generate(other, condition, condition, noise, TEACHER.plan(TRIAL_STEPS).ticks)
    if x0.std() < PLAUSIBLE_STD:
        base.check_prediction(x0, condition)


def _missing_shards(folder: Path, count: int) -> Iterable[tuple[Path, int]]:
    for start in range(0, count, SHARD):
        path = folder / f"latents-{start // SHARD:05d}.safetensors"
        if not path.is_file():
            yield path, start


def _write_shard(path: Path, tensors: dict[str, Tensor], captions: list[str], skipped: list[str]) -> None:
    write_tensors(path, tensors, {"captions": json.dumps(captions), "skipped": json.dumps(skipped)})
