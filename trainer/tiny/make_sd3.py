"""Train the bundled tiny SD3-type base, flow matching without T5, and write it as an ordinary diffusers folder.

    python -m phased_consistency.trainer.tiny.make_sd3 OUT

Pictures and tokenizer are those of the SD1.5-type base. An autoencoder of its kind with sixteen channels is
trained first, then a transformer together with two small CLIP text models, on shifted uniform times with 10 %
empty prompts. The transformer has SD3's proportions (64 channels of width per block), so that a host reads it
as SD3 once its keys are renamed. The bundled base had as many steps as the defaults, an hour and a quarter on
one busy CPU core.

Its 4-step LoRA, which ComfyUI's demo draws with (`comfy`), was made on it by

    OMP_NUM_THREADS=1 pcm train --preset demo-sd3
    cp out/demo-sd3/pcm_demo_sd3_4step.safetensors trainer/tiny/sd3/
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .making import (
    SIDE,
    arguments,
    bf16,
    caption_length,
    clip_config,
    draw_pictures,
    encode_all,
    encode_words,
    random_scenes,
    save_base,
    sd15_tokenizer,
    some_empty,
    token_ids,
    train,
    train_vae,
)

SHIFT = 3.0  # SD3's time shift
CONTEXT = 4096  # width of SD3's text conditioning, T5's


def main(argv: list[str] | None = None) -> None:
    """Make the base: pictures, autoencoder, transformer and text encoders, saved in fp16."""
    parser = arguments(__doc__)
    parser.add_argument("--vae-steps", type=int, default=2_000, help="batches of 16 pictures")
    parser.add_argument("--steps", type=int, default=4_450, help="batches of 64 latents")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    scenes = random_scenes(args.pictures)
    pixels, tokenizer = draw_pictures(scenes), sd15_tokenizer()
    vae = train_vae(pixels, args.vae_steps, channels=16)
    with bf16():
        latents = encode_all(vae, pixels).float()
    shift, scale = round(latents.mean().item(), 5), round(1 / latents.std().item(), 5)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    ids = token_ids(tokenizer, [s.caption for s in scenes])

    transformer = new_transformer()
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer, 64, 2, width)) for width in (768, 1280)]
    train(
        nn.ModuleList([transformer, *encoders]),
        flow_loss(transformer, encoders, (latents - shift) * scale, ids, args.steps),
        len(latents),
        args.steps,
        lambda means: save_base(
            new_pipeline(vae, tokenizer, *means), args.out, tokenizer="tokenizer", tokenizer_2="tokenizer"
        ),
    )


def new_transformer() -> SD3Transformer2DModel:
    """SD3's transformer at depth 3, its modulations starting from nothing as a DiT's do."""
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=64,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=192,
        pooled_projection_dim=768 + 1280,
        pos_embed_max_size=16,
    )
    blocks = transformer.transformer_blocks
    modulations = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def flow_loss(
    transformer: SD3Transformer2DModel,
    encoders: list[CLIPTextModelWithProjection],
    latents: Tensor,
    ids: Tensor,
    steps: int,
) -> Callable[[Tensor, int], Tensor]:
    """The flow-matching loss as a function of a batch's indices and the step.

    Times are uniform before the shift; 10 % of the prompts are empty.
    """

    def loss_of(index: Tensor, step: int) -> Tensor:
        x0, noise = latents[index], torch.randn(len(index), *latents.shape[1:])
        u = torch.rand(len(index), 1, 1, 1)
        s = SHIFT * u / (1 + (SHIFT - 1) * u)
        tokens = some_empty(ids, index, 0.1)[:, : caption_length(step, steps)]
        with bf16():
            (first, pooled), (second, pooled_2) = (encode_words(encoder, tokens) for encoder in encoders)
            context = torch.cat([first, second], -1)
            flow = transformer(
                (1 - s) * x0 + s * noise,
                F.pad(context, (0, CONTEXT - context.shape[-1])),
                torch.cat([pooled, pooled_2], -1),
                1000 * s.flatten(),
            ).sample
        return F.mse_loss(flow.float(), noise - x0)

    return loss_of


def new_pipeline(
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
    encoder: CLIPTextModelWithProjection,
    encoder_2: CLIPTextModelWithProjection,
) -> StableDiffusion3Pipeline:
    """The parts as a diffusers pipeline, which knows how to save them."""
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


if __name__ == "__main__":
    main()
