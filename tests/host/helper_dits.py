"""Nodes for the host tests alone: small random transformers, built by the host from its own configs."""

from functools import partial

import comfy.model_management as memory
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as supported
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.wan.vae import WanVAE

try:
    import comfy.ldm.anima.model as anima
except ImportError:  # an older host
    pass
else:  # its adapter takes no sizes from a config
    small = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_heads": 2}
    anima.LLMAdapter = partial(anima.LLMAdapter, **small)

HEADS = 4
WIDTH = 64  # of the network, so that a head has 16
FLUX = {
    **{"out_channels": 16, "hidden_size": WIDTH, "num_heads": HEADS, "depth": 2, "depth_single_blocks": 2},
    **{"mlp_ratio": 4.0, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "txt_ids_dims": []},
    **{"context_in_dim": 32, "vec_in_dim": 24, "patch_size": 2, "in_channels": 16, "guidance_embed": True},
}
FLUX = {name: value for name, value in FLUX.items() if name in FluxParams.__dataclass_fields__}  # 0.3.64 has fewer
WAN = {
    **{"image_model": "wan2.1", "model_type": "t2v", "dim": WIDTH, "ffn_dim": 128, "freq_dim": 256, "text_dim": 32},
    **{"num_heads": HEADS, "num_layers": 2, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2)},
}
COSMOS = {
    **{"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16},
    **{"patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "model_channels": WIDTH},
    **{"num_blocks": 2, "num_heads": HEADS, "crossattn_emb_channels": 32, "pos_emb_cls": "rope3d"},
    **{"pos_emb_learnable": True, "use_adaln_lora": True, "adaln_lora_dim": 16},
}
# kind -> the host's class, and its network's shape at a size for tests
KINDS = {
    "flux": ("Flux", {"image_model": "flux", **FLUX}),
    "schnell": ("FluxSchnell", {"image_model": "flux", **FLUX, "guidance_embed": False}),
    "flux2": (
        "Flux2",
        {
            **{"image_model": "flux2", **FLUX, "in_channels": 128, "out_channels": 128, "patch_size": 1},
            **{"axes_dim": [4, 4, 4, 4], "theta": 2000, "qkv_bias": False, "mlp_ratio": 3.0, "vec_in_dim": None},
            **{"global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "txt_ids_dims": [3]},
        },
    ),
    "qwen": (
        "QwenImage",
        {
            **{"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 16},
            **{"num_attention_heads": HEADS, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)},
        },
    ),
    "zimage": (
        "ZImage",
        {
            **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 2},
            **{"cap_feat_dim": 32, "qk_norm": True, "n_heads": HEADS, "n_kv_heads": HEADS, "axes_dims": [16, 24, 24]},
            **{"axes_lens": [64, 64, 64], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "time_scale": 1000.0},
            **{"z_image_modulation": True, "n_refiner_layers": 1, "pad_tokens_multiple": 32},
        },
    ),
    "wan": ("WAN21_T2V", WAN),
    "ltxav": (
        "LTXAV",
        {
            **{"image_model": "ltxav", "num_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": 16},
            **{"cross_attention_dim": WIDTH, "audio_num_attention_heads": HEADS, "audio_attention_head_dim": 8},
            **{"audio_cross_attention_dim": 32, "caption_channels": 16, "connector_num_attention_heads": 1},
        },
    ),
    "ltxv": (
        "LTXV",
        {
            **{"image_model": "ltxv", "num_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": 16},
            **{"cross_attention_dim": WIDTH, "caption_channels": 32},
        },
    ),
    "wan_i2v": ("WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}),
    "wan_causal": ("WAN21_CausalAR_T2V", {**WAN, "causal_ar": True}),
    "cosmos": ("CosmosT2IPredict2", {"image_model": "cosmos_predict2", **COSMOS}),
    "anima": ("Anima", {"image_model": "anima", **COSMOS}),
    "krea2": (
        "Krea2",
        {
            **{"image_model": "krea2", "features": WIDTH, "heads": HEADS, "kvheads": 2, "layers": 2},
            **{"channels": 16, "patch": 2, "txtlayers": 2, "txtdim": 16, "txtheads": HEADS, "txtkvheads": 2},
        },
    ),
    "svd": (
        "SVD_img2vid",
        {
            **{"image_size": 32, "in_channels": 8, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1]},
            **{"channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]},
            **{"transformer_depth_middle": 1, "context_dim": 32, "adm_in_channels": 768, "num_classes": "sequential"},
            **{"use_temporal_attention": True, "use_temporal_resblock": True, "use_linear_in_transformer": True},
            **{"video_kernel_size": [3, 1, 1], "merge_strategy": "learned_with_images", "extra_ff_mix_layer": True},
            **{"use_spatial_transformer": True, "legacy": False, "num_heads": -1, "num_head_channels": 16},
        },
    ),
}


class TestTransformer:
    """A random transformer of a kind in `KINDS`. The name is for the graph alone, as a loader has it."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        known = [kind for kind, (name, _) in KINDS.items() if hasattr(supported, name)]
        required = {"architecture": (known,), "seed": ("INT", {"default": 0})}
        return {"required": required, "optional": {"unet_name": ("STRING", {"default": ""})}}

    def make(self, architecture, seed, unet_name=""):
        name, config = KINDS[architecture]
        config = getattr(supported, name)(config)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("cpu")).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.diffusion_model.named_parameters():
                if weight.ndim > 1:
                    weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
                else:
                    weight.fill_(0.0 if key.endswith("bias") else 1.0)
        return (comfy.model_patcher.ModelPatcher(model, memory.get_torch_device(), torch.device("cpu")),)


class TestAutoencoder:
    """The VAE of a checkpoint alone."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": ("STRING", {})}}

    def load(self, ckpt_name):
        import nodes

        return (nodes.CheckpointLoaderSimple().load_checkpoint(ckpt_name)[2],)


class TestClipAutoencoder:
    """A small random VAE of Wan's and Qwen-Image's kind, whose latents have frames."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
            for weight in network.parameters():
                # the host makes its layers with whatever is in memory
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
        return (comfy.sd.VAE(sd=network.state_dict()),)


class TestSound:
    """An empty latent of sound, as LTX-2 has it beside its video."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"length": ("INT", {"default": 8})}}

    def make(self, length):
        return ({"samples": torch.zeros(1, 8, length, 16), "type": "audio"},)


NODE_CLASS_MAPPINGS = {
    "TestSound": TestSound,
    "TestTransformer": TestTransformer,
    "TestAutoencoder": TestAutoencoder,
    "TestClipAutoencoder": TestClipAutoencoder,
}
