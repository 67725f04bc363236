"""Train the bundled tiny SD1.5-type base and write it as an ordinary diffusers folder.

    python -m phased_consistency.trainer.tiny.make_sd15 OUT

Everything is made here: the pictures (`scenes`), a byte-pair tokenizer on their captions, an
`AutoencoderTiny` with SD1.5's eightfold, four-channel latents, and a UNet trained together with a small CLIP
text model on eps-prediction with SD1.5's scaled-linear betas and 10 % empty prompts. The bundled base was
made with the defaults, which take about 50 minutes on 2 CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .making import (
    SIDE,
    arguments,
    clip_config,
    draw_pictures,
    encode_all,
    make_tokenizer,
    random_scenes,
    save_base,
    some_empty,
    token_ids,
    train,
    train_vae,
    vp_scheduler,
)


def main(argv: list[str] | None = None) -> None:
    """Make the base: pictures, tokenizer, autoencoder, UNet and text model, saved in fp16."""
    parser = arguments(__doc__)
    parser.add_argument("--vae-steps", type=int, default=2_000, help="batches of 16 pictures")
    parser.add_argument("--unet-steps", type=int, default=5_500, help="batches of 64 latents")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    scenes = random_scenes(args.pictures)
    captions = [s.caption for s in scenes]
    pixels = draw_pictures(scenes)
    tokenizer = make_tokenizer(captions, args.out / "tokenizer")
    vae = train_vae(pixels, args.vae_steps)
    latents = encode_all(vae, pixels)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))

    unet = new_unet().to(memory_format=torch.channels_last)
    text_model = CLIPTextModel(clip_config(tokenizer, hidden_size=96, layers=2, projection_dim=96))
    train(
        nn.ModuleList([unet, text_model]),
        eps_loss(unet, text_model, latents * vae.config.scaling_factor, token_ids(tokenizer, captions)),
        len(captions),
        args.unet_steps,
        lambda means: save_base(new_pipeline(vae, tokenizer, *means), args.out),
    )


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


def eps_loss(
    unet: UNet2DConditionModel, text_model: CLIPTextModel, latents: Tensor, ids: Tensor
) -> Callable[[Tensor, int], Tensor]:
    """The eps-prediction loss as a function of a batch's indices and the step, with 10 % empty prompts."""
    alphas_bar = vp_scheduler().alphas_cumprod

    def loss_of(index: Tensor, step: int) -> Tensor:
        x0, noise = latents[index], torch.randn(len(index), *latents.shape[1:])
        t = torch.randint(0, 1000, (len(index),))
        a = alphas_bar[t].view(-1, 1, 1, 1)
        context = text_model(some_empty(ids, index, 0.1))[0]
        return F.mse_loss(unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, context).sample, noise)

    return loss_of


def new_pipeline(
    vae: AutoencoderTiny, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel, text_model: CLIPTextModel
) -> StableDiffusionPipeline:
    """The parts as a diffusers pipeline, which knows how to save them."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_model,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=vp_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main()
