"""The steps that the makers of the tiny bases share (`make_sd15`, `make_sdxl`, `make_emoji`).

They draw pictures, make a tokenizer of the captions, train an autoencoder, train the network, and save all.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .scenes import Scene, draw, prompts, random_scene

SIDE = 128  # of the pictures, in pixels
START, END = "<|startoftext|>", "<|endoftext|>"
# a CPU without AVX-512 makes bf16 of fp32, product by product: seven to twenty times slower than fp32 itself
MAKING_DTYPE = torch.float32 if torch.backends.cpu.get_cpu_capability() == "AVX2" else torch.bfloat16
CAPTION_TOKENS = 24  # no caption is longer; of the 77 tokens that inference sees, the rest are padding
SD15 = Path(__file__).parent / "sd15"  # the bundled SD1.5-type base, whose parts the others take


def arguments(about: str) -> argparse.ArgumentParser:
    """The command line that every maker has: where to write, and how many pictures to draw."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=24_000, help="scenes drawn once and trained on throughout")
    return parser


def random_scenes(count: int) -> list[Scene]:
    """The scenes that every base learns from."""
    rng = random.Random(0)
    return [random_scene(rng) for _ in range(count)]


def pixels_of(scene: Scene, side: int = SIDE) -> Tensor:
    """A scene drawn as uint8 pixels (3, side, side)."""
    return torch.from_numpy(np.asarray(draw(scene, side, oversample=2)).copy()).permute(2, 0, 1)


def draw_pictures(scenes: list[Scene]) -> Tensor:
    """Uint8 pixels (N, 3, SIDE, SIDE) of every scene."""
    pixels = torch.empty(len(scenes), 3, SIDE, SIDE, dtype=torch.uint8)
    for i, scene in enumerate(scenes):
        pixels[i] = pixels_of(scene)
    return pixels


def make_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train a byte-level BPE in CLIP's form (`</w>` word ends) on the captions, and save it as CLIP tokenizer files."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))

    # CLIP's vocabulary: what was trained, then every letter as the end of a word, then the two marks
    vocab = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))[0]
    for token in (*(a + "</w>" for a in alphabet), START, END):
        vocab.setdefault(token, len(vocab))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def sd15_tokenizer() -> CLIPTokenizer:
    """The bundled SD1.5 base's tokenizer, which knows the captions' language."""
    return CLIPTokenizer.from_pretrained(SD15 / "tokenizer")


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids (N + 1, 77) of the captions and, last, of the empty prompt."""
    return tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids


def some_empty(ids: Tensor, index: Tensor, chance: float) -> Tensor:
    """The ids of the captions at `index`, each with this chance of being the empty prompt's instead."""
    return ids[torch.where(torch.rand(len(index)) < chance, len(ids) - 1, index)]


def caption_length(step: int, steps: int) -> int:
    """How many tokens to train on: the captions' own for four fifths of the steps, then all that inference sees."""
    return CAPTION_TOKENS if step < 0.8 * steps else 77


def write_prompts(captions: list[str], folder: Path) -> None:
    """Write a base's prompts to distil from."""
    comment = "# Captions of random scenes, the language of this base (scenes.prompts).\n"
    (folder / "prompts.txt").write_text(comment + "\n".join(captions) + "\n", encoding="utf-8")


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer's vocab.json and merges.txt, which transformers 4 and a single file's `base.tokenizer` read."""
    if not hasattr(tokenizer, "backend_tokenizer"):  # transformers 4
        tokenizer.save_vocabulary(str(folder))
        return
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    words = json.dumps(tokenizer.get_vocab(), ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(words, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8")


def clip_config(tokenizer: CLIPTokenizer, hidden_size: int, layers: int, projection_dim: int) -> CLIPTextConfig:
    """A small CLIP text model's shape, with heads of 16 to 24 channels."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode_words(
    encoder: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Penultimate hidden states (B, L, hidden) and, with a projection, the pooled embedding (B, projection).

    places: the tokens' positions (1, L) where they are not 0 to L - 1.
    """
    output = encoder(ids, position_ids=places, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def vp_scheduler(**changes) -> DDIMScheduler:
    """SD1.5's and SDXL's own noise schedule; `changes` are further settings of the scheduler."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        **changes,
    )


@contextmanager
def bf16() -> Iterator[None]:
    """Autocast to bf16 where the CPU computes in it, with plain attention: on so few tokens CPU flash attention is slow
    to differentiate."""
    with torch.autocast("cpu", torch.bfloat16, enabled=MAKING_DTYPE is torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def batches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    """`steps` index batches, reshuffled whenever `count` is used up."""
    per_epoch = count // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(count)
        start = step % per_epoch * size
        yield order[start : start + size]


def warm_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Two hundred steps of warm-up, constant until half-way, then a cosine to zero."""

    def factor(step: int) -> float:
        share = step / steps
        return min(1.0, (step + 1) / 200) * (1.0 if share < 0.5 else math.cos((share - 0.5) * math.pi))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR
) -> None:
    """One clipped optimizer step."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def train_vae(pixels: Tensor, steps: int, channels: int = 4) -> AutoencoderTiny:
    """Train an eightfold autoencoder on an L1 + edge loss, with noisy latents so that the decoder is smooth."""
    vae = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 1, 1, 1),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = warm_then_cosine(optimizer, steps)
    for step, index in enumerate(batches(len(pixels), 16, steps)):
        image = pixels[index].to(memory_format=torch.channels_last).float().div(127.5).sub(1)
        with bf16():
            latents = vae.encoder(image)
            decoded = vae.decoder(latents + 0.08 * torch.randn_like(latents)).float()
        edges = sum(F.l1_loss(decoded.diff(dim=axis), image.diff(dim=axis)) for axis in (2, 3))
        loss = F.l1_loss(decoded, image) + F.mse_loss(decoded, image) + edges + 1e-2 * latents.float().square().mean()
        update(loss, vae, optimizer, schedule)
        if step % 250 == 249:
            print(
                f"autoencoder: step {step + 1}, loss {loss.item():.4f}, latent std {latents.std().item():.3f}",
                flush=True,
            )
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, pixels: Tensor) -> Tensor:
    """Unscaled latents of every picture, (N, channels, SIDE/8, SIDE/8)."""
    return torch.cat([vae.encoder(chunk.float().div(127.5).sub(1)) for chunk in pixels.split(64)])


def train(
    parts: nn.ModuleList,
    loss_of: Callable[[Tensor, int], Tensor],
    count: int,
    steps: int,
    save: Callable[[nn.ModuleList], None],
) -> None:
    """Train `parts` together on `loss_of(batch, step)`, in batches of 64 of `count` pictures, and save their averages.

    They are saved every thousand steps too, so that a run cut short leaves a usable base.
    """
    print(f"{sum(p.numel() for p in parts.parameters()) / 1e6:.2f} M parameters", flush=True)
    average = deepcopy(parts).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = warm_then_cosine(optimizer, steps)

    running = 0.0  # the loss as an average over about a hundred steps
    for step, index in enumerate(batches(count, 64, steps)):
        loss = loss_of(index, step)
        update(loss, parts, optimizer, schedule)
        decay = min(0.999, (step + 1) / (step + 10))  # short at first, so that the random start is soon forgotten
        for mean, now in zip(average.parameters(), parts.parameters(), strict=True):
            mean.lerp_(now.detach(), 1 - decay)
        running = 0.99 * running + 0.01 * loss.item()
        if step % 250 == 249:
            print(f"step {step + 1} of {steps}, loss {running:.4f}", flush=True)
        if step % 1000 == 999 or step == steps - 1:
            save(average)


def save_base(pipeline: DiffusionPipeline, out: Path, **copied: str) -> None:
    """Write the diffusers folder in fp16, with prompts to distil from, and say how large it is.

    Each of `copied` is a part taken as it lies in the bundled SD1.5-type base: its name here, its name there.
    """
    deepcopy(pipeline).to(torch.float16).save_pretrained(out, safe_serialization=True)
    for part, source in copied.items():
        shutil.copytree(SD15 / source, out / part, dirs_exist_ok=True)
    write_prompts(prompts(512, seed=1), out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 1e6:.1f} MB", flush=True)
