"""Train the bundled tiny SDXL-type base, v-prediction with zero terminal SNR, and write it as a diffusers folder.

    python -m phased_consistency.trainer.tiny.make_sdxl OUT

Pictures, tokenizer and autoencoder are those of the SD1.5-type base. A third of the pictures are crops, and
the micro-conditioning says so; one prompt in ten is SDXL's zero embeddings and one in twenty the empty
prompt, so that both work as the unconditional half of guidance. The bundled base had as many steps as the
defaults, an hour on one
busy CPU core.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .making import (
    SD15,
    SIDE,
    arguments,
    bf16,
    caption_length,
    clip_config,
    encode_all,
    encode_words,
    pixels_of,
    random_scenes,
    save_base,
    sd15_tokenizer,
    some_empty,
    token_ids,
    train,
    vp_scheduler,
)
from .scenes import Scene

WIDE = 160  # side in pixels of the pictures that are cropped


def main(argv: list[str] | None = None) -> None:
    """Make the base: pictures with their crops, UNet and text encoders, saved in fp16."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=3_400, help="batches of 64 latents")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    scenes = random_scenes(args.pictures)
    pixels, time_ids = draw_crops(scenes)
    vae, tokenizer = AutoencoderTiny.from_pretrained(SD15 / "vae"), sd15_tokenizer()
    with bf16():
        latents = encode_all(vae, pixels).float() * vae.config.scaling_factor
    ids = token_ids(tokenizer, [s.caption for s in scenes])

    unet = new_unet()
    config = clip_config(tokenizer, hidden_size=64, layers=2, projection_dim=64)
    words, pooling = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    train(
        nn.ModuleList([unet, words, pooling]),
        v_loss(unet, words, pooling, latents, time_ids, ids, args.steps),
        len(latents),
        args.steps,
        lambda means: save_base(
            new_pipeline(vae, tokenizer, *means),
            args.out,
            vae="vae",
            tokenizer="tokenizer",
            tokenizer_2="tokenizer",
        ),
    )


def draw_crops(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Uint8 pixels (N, 3, SIDE, SIDE), a third cropped from WIDE pictures, and their micro-conditioning (N, 6)."""
    rng = random.Random(1)
    pixels, time_ids = torch.empty(len(scenes), 3, SIDE, SIDE, dtype=torch.uint8), torch.empty(len(scenes), 6)
    for i, scene in enumerate(scenes):
        side = WIDE if rng.random() < 1 / 3 else SIDE
        top, left = rng.randint(0, side - SIDE), rng.randint(0, side - SIDE)
        pixels[i] = pixels_of(scene, side)[:, top : top + SIDE, left : left + SIDE]
        time_ids[i] = torch.tensor([side, side, top, left, SIDE, SIDE])
    return pixels, time_ids


def new_unet() -> UNet2DConditionModel:
    """SDXL's kinds of block at 1/1000 of its size."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(48, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=64 + 6 * 32,
    )


def v_loss(
    unet: UNet2DConditionModel,
    words: CLIPTextModel,
    pooling: CLIPTextModelWithProjection,
    latents: Tensor,
    time_ids: Tensor,
    ids: Tensor,
    steps: int,
) -> Callable[[Tensor, int], Tensor]:
    """The v-prediction loss as a function of a batch's indices and the step.

    10 % of the prompts are zero embeddings and 5 % empty.
    """
    alphas_bar = sdxl_scheduler().alphas_cumprod

    def loss_of(index: Tensor, step: int) -> Tensor:
        x0, noise = latents[index], torch.randn(len(index), *latents.shape[1:])
        t = torch.randint(0, 1000, (len(index),))
        a = alphas_bar[t].view(-1, 1, 1, 1)
        tokens = some_empty(ids, index, 0.05)[:, : caption_length(step, steps)]
        with_prompt = (torch.rand(len(index), 1) >= 0.1).float()
        with bf16():
            (first, _), (second, pooled) = encode_words(words, tokens), encode_words(pooling, tokens)
            v = unet(
                a.sqrt() * x0 + (1 - a).sqrt() * noise,
                t,
                torch.cat([first, second], -1) * with_prompt[:, None],
                added_cond_kwargs={"text_embeds": pooled * with_prompt, "time_ids": time_ids[index]},
            ).sample
        return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * x0)

    return loss_of


def sdxl_scheduler() -> DDIMScheduler:
    """SDXL's betas rescaled to a terminal SNR of zero, as its v-prediction fine-tunes use them."""
    return vp_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def new_pipeline(
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    words: CLIPTextModel,
    pooling: CLIPTextModelWithProjection,
) -> StableDiffusionXLPipeline:
    """The parts as a diffusers pipeline, which knows how to save them."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=words,
        text_encoder_2=pooling,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=sdxl_scheduler(),
        add_watermarker=False,
    )


if __name__ == "__main__":
    main()
