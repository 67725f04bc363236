"""A LoRA's family by its tensors: each family's own modules tell it, and no other family's do."""

import inspect

import diffusers
import pytest
import torch
from diffusers.models import transformers
from torch import nn

from phased_consistency.samplers.lora_family import family_by_tensors
from phased_consistency.samplers.lora_modules import LoraModule
from phased_consistency.samplers.lora_names import module_name

BLOCKS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "num_refiner_layers")


def lora_on(shapes, prefix):
    """Modules of a LoRA of rank 4 on layers by their path, each (out, in)."""
    modules = {}
    for path, (out, width) in shapes.items():
        modules[module_name(prefix + path)] = LoraModule(path, shapes={"down": (4, width), "up": (out, 4)})
    return modules


def linears(kind):
    """The linear layers of one of diffusers' transformers in its authors' size, with one block of each sort."""
    one = {name: 1 for name in BLOCKS if name in inspect.signature(kind.__init__).parameters}
    with torch.device("meta"):
        network = kind(**one)
    return {path: tuple(m.weight.shape) for path, m in network.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("FluxTransformer2DModel", "flux"),
        ("LongCatImageTransformer2DModel", "flux"),  # as ComfyUI has it too
        ("Flux2Transformer2DModel", "flux2"),
        ("ChromaTransformer2DModel", "chroma"),
        ("QwenImageTransformer2DModel", "qwen_image"),
        ("ZImageTransformer2DModel", "lumina2"),
        ("LTXVideoTransformer3DModel", "ltxv"),
        ("LTX2VideoTransformer3DModel", "ltxav"),
        # what has much in common with those above
        *[
            (kind, None)
            for kind in (
                "AuraFlowTransformer2DModel",
                "CogVideoXTransformer3DModel",
                "CogView4Transformer2DModel",
                "CosmosTransformer3DModel",
                "Lumina2Transformer2DModel",
                "MochiTransformer3DModel",
                "SanaTransformer2DModel",
                "PixArtTransformer2DModel",
                "StableAudioDiTModel",
            )
        ],
    ],
)
def test_diffusers_transformers(kind, family):
    if not hasattr(transformers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    layers = linears(getattr(transformers, kind))
    assert family_by_tensors(lora_on(layers, "transformer.")) == family


def wan(width):
    return {"blocks.0.self_attn.q": (width, width), "blocks.0.ffn.0": (4 * width, width)}


HIDREAM = "double_stream_blocks.0.block.attn1.to_q"


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({"double_blocks.0.img_attn.qkv": (9216, 3072), "double_blocks.0.img_mod.lin": (18432, 3072)}, "flux"),
        ({"single_blocks.0.linear1": (21504, 3072), "single_blocks.0.modulation.lin": (9216, 3072)}, "flux"),
        ({"single_blocks.0.linear1": (55296, 6144)}, "flux2"),
        ({"double_blocks.0.img_mlp.0": (36864, 6144)}, "flux2"),
        ({"double_blocks.0.img_mlp.0": (18432, 3072)}, "flux2"),  # klein 4B is as wide as FLUX.1
        ({"double_blocks.0.img_attn_qkv": (9216, 3072), "double_blocks.0.img_mlp.fc1": (12288, 3072)}, "hunyuan_video"),
        ({"layers.0.attention.qkv": (11520, 3840)}, "lumina2"),
        *[(wan(width), "wan2.1") for width in (1536, 3072, 5120)],
        ({HIDREAM: (2560, 2560)}, "hidream"),
        ({"blocks.0.attn.wq": (6144, 6144)}, "krea2"),
        ({"llm_adapter.blocks.0.self_attn.q_proj": (1024, 1024), "blocks.0.mlp.layer1": (8192, 2048)}, "anima"),
        ({"transformer_blocks.59.attn.add_q_proj": (3072, 3072)}, "qwen_image"),
        ({"joint_blocks.0.x_block.attn.qkv": (4608, 1536)}, "sd3"),
        # what families share tells none: FLUX.1 or Chroma; Cosmos or Anima; widths that no such model has
        ({"double_blocks.0.img_attn.qkv": (9216, 3072), "single_blocks.0.linear1": (21504, 3072)}, None),
        ({"transformer_blocks.0.attn.add_q_proj": (3072, 3072)}, None),
        ({"blocks.0.self_attn.q_proj": (2048, 2048)}, None),
        ({"layers.0.attention.qkv": (6912, 2304)}, None),
        (wan(64), None),
        ({HIDREAM: (64, 64)}, None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_the_authors_own_names(shapes, family, prefix):
    """As ComfyUI has them: with dots, and as kohya's scripts write them."""
    if prefix == "lora_unet_" and any(path.startswith(("transformer_", "joint_")) for path in shapes):
        prefix = "lora_transformer_"
    assert family_by_tensors(lora_on(shapes, prefix)) == family


def test_svd_is_known_by_its_layers_over_frames():
    """Its UNet's text is as wide as SD2's; the layers are called otherwise by its authors and in diffusers."""
    with torch.device("meta"):
        network = diffusers.UNetSpatioTemporalConditionModel(layers_per_block=1)
    ours = {path: tuple(m.weight.shape) for path, m in network.named_modules() if isinstance(m, nn.Linear)}
    authors = {"input_blocks.1.1.time_stack.0.attn1.to_q": (320, 320)}
    for shapes in (ours, authors):
        assert family_by_tensors(lora_on(shapes, "unet.")) == "svd_img2vid"
    plain = {path: shape for path, shape in ours.items() if "temporal" not in path}
    assert family_by_tensors(lora_on(plain, "unet.")) == "sd2"
