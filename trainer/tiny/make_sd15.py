"""Train the bundled tiny SD1.5-type base and write it as an ordinary diffusers folder.

    python -m phased_consistency.trainer.tiny.make_sd15 OUT

Everything is made here: the pictures (`scenes`), a byte-pair tokenizer on their captions, an `AutoencoderTiny` with
SD1.5's eightfold, four-channel latents, and a UNet trained together with a small CLIP text model on eps-prediction
with SD1.5's scaled-linear betas and 10 % empty prompts. The bundled base was made with the defaults, which take about
50 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import draw, prompts, random_scene

SIDE = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def main(argv: list[str] | None = None) -> None:
    """Make the base: pictures, tokenizer, autoencoder, UNet and text model, then save them in fp16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=24_000, help="scenes drawn once and trained on throughout")
    parser.add_argument("--vae-steps", type=int, default=2_000, help="batches of 16 pictures")
    parser.add_argument("--unet-steps", type=int, default=5_500, help="batches of 64 latents")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    pixels, captions = draw_pictures(args.pictures)
    tokenizer = make_tokenizer(captions, args.out / "tokenizer")
    vae = train_vae(pixels, args.vae_steps)
    latents = encode_all(vae, pixels)
    std = latents.std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    unet, text_model = train_unet(latents * vae.config.scaling_factor, captions, tokenizer, args.unet_steps)
    save(args.out, unet, text_model, tokenizer, vae)


def draw_pictures(count: int) -> tuple[torch.Tensor, list[str]]:
    """Draw `count` random scenes: uint8 pixels (count, 3, SIDE, SIDE) and their captions."""
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(count)]
    pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    for i, scene in enumerate(scenes):
        pixels[i] = torch.from_numpy(np.asarray(draw(scene, SIDE, oversample=2)).copy()).permute(2, 0, 1)
    return pixels, [s.caption for s in scenes]


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
    vocab = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))[0]
    for token in (*(a + "</w>" for a in alphabet), START, END):
        vocab.setdefault(token, len(vocab))
    merges = [
        tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines() if not line.startswith("#")
    ]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def batches(count: int, size: int, steps: int) -> Iterator[torch.Tensor]:
    """`steps` index batches, reshuffled whenever `count` is used up."""
    per_epoch = count // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(count)
        at = step % per_epoch * size
        yield order[at : at + size]


def warm_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Two hundred steps of warm-up, constant until half-way, then a cosine to zero."""

    def factor(step: int) -> float:
        spent = step / steps
        return min(1.0, (step + 1) / 200) * (1.0 if spent < 0.5 else math.cos((spent - 0.5) * math.pi))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vae(pixels: torch.Tensor, steps: int) -> AutoencoderTiny:
    """Train the autoencoder on an L1 + edge loss, with noisy latents so that the decoder is smooth around each code."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 1, 1, 1),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = warm_then_cosine(optimizer, steps)
    for step, index in enumerate(batches(len(pixels), 16, steps)):
        image = pixels[index].to(memory_format=torch.channels_last).float().div(127.5).sub(1)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encoder(image)
            seen = vae.decoder(latents + 0.08 * torch.randn_like(latents)).float()
        edges = sum(F.l1_loss(seen.diff(dim=d), image.diff(dim=d)) for d in (2, 3))
        loss = F.l1_loss(seen, image) + F.mse_loss(seen, image) + edges + 1e-2 * latents.float().square().mean()
        update(loss, vae, optimizer, schedule)
        if step % 250 == 249:
            print(
                f"autoencoder: step {step + 1}, loss {loss.item():.4f}, latent std {latents.std().item():.3f}",
                flush=True,
            )
    return vae.eval().requires_grad_(False)


def update(
    loss: torch.Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    """One clipped optimizer step."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, pixels: torch.Tensor) -> torch.Tensor:
    """Unscaled latents of every picture, (N, 4, SIDE/8, SIDE/8)."""
    return torch.cat([vae.encoder(chunk.float().div(127.5).sub(1)) for chunk in pixels.split(64)])


def new_unet() -> UNet2DConditionModel:
    """SD1.5's kinds of block at 1/200 of its size; attention only where it is cheap, at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model for this tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_unet(
    latents: torch.Tensor, captions: list[str], tokenizer: CLIPTokenizer, steps: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train UNet and text model together on eps-prediction; returns their moving averages."""
    unet, text_model = new_unet(), new_text_model(tokenizer)
    print(f"unet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters", flush=True)
    scheduler = sd15_scheduler()
    alphas_bar = scheduler.alphas_cumprod
    ids = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    pair = torch.nn.ModuleList([unet.to(memory_format=torch.channels_last), text_model])
    average = deepcopy(pair).requires_grad_(False)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = warm_then_cosine(optimizer, steps)
    running = 0.0
    for step, index in enumerate(batches(len(latents), 64, steps)):
        x0, noise = latents[index], torch.randn(len(index), *latents.shape[1:])
        t = torch.randint(0, 1000, (len(index),))
        a = alphas_bar[t].view(-1, 1, 1, 1)
        words = ids[torch.where(torch.rand(len(index)) < 0.1, len(captions), index)]
        eps = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text_model(words)[0]).sample
        loss = F.mse_loss(eps, noise)
        update(loss, pair, optimizer, schedule)
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), pair.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        running = 0.99 * running + 0.01 * loss.item()
        if step % 250 == 249:
            print(f"unet: step {step + 1}, loss {running:.4f}", flush=True)
    return average[0].eval(), average[1].eval()


def sd15_scheduler() -> DDIMScheduler:
    """SD1.5's own noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def save(
    out: Path, unet: UNet2DConditionModel, text_model: CLIPTextModel, tokenizer: CLIPTokenizer, vae: AutoencoderTiny
) -> None:
    """Write the diffusers folder in fp16 and say how large it is."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_model,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sd15_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    words = "# Captions of random scenes, the language of this base (scenes.prompts(512, seed=1)).\n"
    (out / "prompts.txt").write_text(words + "\n".join(prompts(512, seed=1)) + "\n")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
