"""Nodes for the host tests alone: copied into the temporary custom_nodes, never part of the pack."""

import copy
import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


class TestConditioning:
    """Random text conditioning of any width, so that no text encoder is needed. The words are for the graph alone."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        widths = {"width": ("INT", {"default": 768}), "pooled": ("INT", {"default": 2048})}
        optional = {"text": ("STRING", {}), "masked": ("BOOLEAN", {})}
        return {"required": {"seed": ("INT", {"default": 0}), **widths}, "optional": optional}

    def make(self, seed, width, pooled, text="", masked=False):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 77, width, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)}
        return ([[text, extra | ({"attention_mask": torch.ones(1, 77)} if masked else {})]],)


class TestEncoding:
    """Prompt `number` of a file of encodings as the trainer makes them, for a picture of this side."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {}), "number": ("INT", {}), "side": ("INT", {})}}

    def make(self, path, number, side):
        read = {k.split(" ")[1]: v for k, v in load_file(path).items() if k.startswith(f"{number} ")}
        extra = {f"{kind}{axis}": side for kind in ("", "target_") for axis in ("width", "height")}
        extra |= {"crop_w": 0, "crop_h": 0} | ({"pooled_output": read["pooled"]} if "pooled" in read else {})
        return ([[read["hidden"], extra]],)


class TestLatent:
    """A random latent of 8 x 8, in the form that the host keeps latents."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "batch": ("INT", {"default": 1})}}

    def make(self, seed, batch):
        return ({"samples": 5 * torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))},)


class TestSigmas:
    """Puts SIGMAS, and what the process has imported, into the history."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "show", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",)}}

    def show(self, sigmas):
        return {"ui": {"sigmas": sigmas.tolist(), "modules": list(sys.modules)}}


class TestPicture:
    """A random IMAGE, half of it even, of any size and number of channels, and a MASK of it as named."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "MASK"), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {name: ("INT", {}) for name in ("width", "height", "channels", "batch", "seed")}
        return {"required": {**sizes, "mask": (["middle", "soft", "empty", "full"],)}}

    def make(self, width, height, channels, batch, seed, mask):
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(batch, height, width, channels, generator=generator)
        image[:, height // 2 :] = 0.25 + 0.5 * image[:, :1, :1]
        drawn = torch.full((1, height, width), float(mask == "full"))
        if mask in ("middle", "soft"):
            drawn[:, height // 4 : height // 2, width // 3 : width // 2] = 1.0 if mask == "middle" else 0.5
        return image, drawn


class TestImage:
    """An IMAGE from a file, unrounded."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "read", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {})}}

    def read(self, path):
        return (load_file(path)["image"],)


class TestNoise:
    """As core's RandomNoise, times a factor; and these sigmas."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("NOISE", "SIGMAS"), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {}), "amount": ("FLOAT", {"round": False}), "sigmas": ("STRING", {})}}

    def make(self, seed, amount, sigmas):
        from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

        class Scaled(Noise_RandomNoise):
            def generate_noise(self, latent):
                return amount * super().generate_noise(latent)

        return Scaled(seed), torch.tensor([float(sigma) for sigma in sigmas.split()])


class TestTensor:
    """Saves an IMAGE or a LATENT as it is, unrounded."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("IMAGE,LATENT",), "name": ("STRING", {})}}

    def save(self, value, name):
        import folder_paths

        tensor = value["samples"] if isinstance(value, dict) else value
        path = Path(folder_paths.get_output_directory(), f"{name}.safetensors")
        path.parent.mkdir(exist_ok=True)
        save_file({"value": tensor.contiguous()}, path)
        return {}


class TestVAE:
    """The VAE, logged at each `decode`, which may also fail, interrupt or unload all; or one whose latents are loud."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "how": (["memory", "interrupt", "unload", "log", "loud"],)}}

    def make(self, vae, how):
        import comfy.model_management as memory

        class Odd(type(vae)):
            def decode(self, latents, *options):
                print(f"TestVAE {how} {tuple(latents.shape)}", flush=True)
                if how == "interrupt":
                    memory.interrupt_current_processing()
                if how == "memory":
                    return self.without_memory(latents)
                pixels = super().decode(latents, *options)
                if how == "unload":
                    memory.unload_all_models()
                return pixels

            def encode(self, pixels):
                return (200 if how == "loud" else 1) * super().encode(pixels)

            def without_memory(self, latents):
                def fail(*shape):
                    raise memory.OOM_EXCEPTION("simulated")

                needed, self.memory_used_decode = self.memory_used_decode, fail
                try:
                    return super().decode(latents)
                finally:
                    self.memory_used_decode = needed

        odd = copy.copy(vae)
        odd.__class__ = Odd
        return (odd,)


class TestCount:
    """The MODEL, logged at each evaluation with the prompts it is for; it may interrupt at one of them."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING", {}), "stop_at": ("INT", {"default": 0})}}

    def make(self, model, name, stop_at):
        import comfy.model_management as memory

        calls = []

        def evaluate(apply_model, given):
            prompts = "".join("+-"[kind] for kind in given["cond_or_uncond"])
            print(f"TestCount {name} {float(given['timestep'][0]):.4f} {prompts}", flush=True)
            calls.append(prompts)
            if len(calls) == stop_at:
                memory.interrupt_current_processing()
            return apply_model(given["input"], given["timestep"], **given["c"])

        counted = model.clone()
        counted.set_model_unet_function_wrapper(evaluate)
        return (counted,)


class TestAlive:
    """Puts the number of networks that are alive, loaded or not, into the history."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "count", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}, "optional": {"after": ("LATENT",)}}

    def count(self, name, after=None):
        import gc

        from comfy.model_base import BaseModel

        gc.collect()
        return {"ui": {"alive": [sum(isinstance(each, BaseModel) for each in gc.get_objects())]}}


class TestOffload:
    """The MODEL, of which no more than a share is ever loaded: the host patches the rest layer by layer, as it runs."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "share": ("FLOAT", {"default": 0.5})}}

    def make(self, model, share):
        class Short(type(model)):
            def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
                super().load(device_to, max(share * self.model_size(), 1), force_patch_weights)
                print(f"TestOffload {self.loaded_size() / self.model_size():.2f}", flush=True)

        short = model.clone()
        short.__class__ = Short
        return (short,)


class TestUnload:
    """The LATENT, once all models have been unloaded."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "unload", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def unload(self, samples):
        import comfy.model_management as memory

        memory.unload_all_models()
        return (samples,)


class TestClock:
    """The MODEL and the LATENT, and a clock that runs from here on, and tells apart what the network takes."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "LATENT", "CLOCK"), "start", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",), "name": ("STRING", {})}}

    def start(self, model, samples, name):
        spent = {"network": [0.0, 0.0]}

        def evaluate(apply_model, given):
            begin = _now()
            result = apply_model(given["input"], given["timestep"], **given["c"])
            spent["network"] = [sum(each) for each in zip(spent["network"], _since(begin), strict=True)]
            return result

        timed = model.clone()
        timed.set_model_unet_function_wrapper(evaluate)
        spent["start"] = _now()
        return (timed, samples, spent)


class TestClockStop:
    """Puts the clock's seconds, by the wall and of the thread's processor, into the history: all, the network's."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "stop", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clock": ("CLOCK",), "samples": ("LATENT",)}}

    def stop(self, clock, samples):
        return {"ui": {"all": _since(clock["start"]), "network": clock["network"]}}


class TestByHand:
    """A LoRA for which core has no patch, added by its definition to the weights as the layers have them, in fp32."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "add", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "lora": ("STRING", {}), "strength": ("FLOAT", {"default": 1.0})}}

    def add(self, model, lora, strength):
        import comfy.lora
        import folder_paths
        from comfy.model_management import unload_all_models

        unload_all_models()  # of a clone that was sampled with its own LoRA the shared weights have that in them
        path = folder_paths.get_full_path_or_raise("loras", lora)
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            settings = json.loads(file.metadata().get("lora_adapter_metadata", "{}"))
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        parts = {}
        for name, tensor in tensors.items():
            # of kohya's names, of IA3 here, ".weight" is a part itself
            module, _, part = (name.removesuffix(".weight") if settings else name).rpartition(".")
            if settings:
                module = f"lora_unet_{module.removeprefix('unet.').replace('.', '_')}"
            parts.setdefault(module, {})[part] = tensor
        scale = settings.get("unet.lora_alpha", 1) / settings.get("unet.r", 1)
        patches = {
            keys[module]: (_added(_weight(model.model, keys[module]), scale, **p),) for module, p in parts.items()
        }
        patched = model.clone()
        assert set(patched.add_patches(patches, strength)) == set(patches)
        return (patched,)


def _weight(model, key):
    """A weight in fp32, widened by the host, or by the layer itself where another pack keeps it."""
    import comfy.utils
    from comfy.model_patcher import get_key_weight

    layer = comfy.utils.get_attr(model, key.removesuffix(".weight"))
    if hasattr(layer, "get_weight"):
        return layer.get_weight(layer.weight, torch.float32)
    weight, _, widen = get_key_weight(model, key)
    weight = weight.to(torch.float32, copy=True)
    return widen(weight, inplace=True) if widen else weight


def _added(w, scale, lora_A=None, lora_B=None, lora_magnitude_vector=None, weight=None, on_input=None):
    """What is added to W: of PEFT's DoRA m (W + s B A) / |W + s B A| - W by rows, of IA3 a share of rows or columns."""
    if weight is not None:
        return w * (weight if on_input else weight[:, None])
    whole = w + scale * (lora_B.flatten(1) @ lora_A.flatten(1)).view_as(w)
    lengths = whole.flatten(1).norm(dim=1)
    # in this order, whose last digits decide between two neighbours where a weight is rounded to 8 bits again
    return whole * (lora_magnitude_vector.flatten() / lengths).view(-1, *[1] * (w.ndim - 1)) - w


def _now():
    return [time.perf_counter(), time.thread_time()]


def _since(begin):
    return [now - then for now, then in zip(_now(), begin, strict=True)]


KINDS = (
    TestConditioning,
    TestEncoding,
    TestLatent,
    TestSigmas,
    TestPicture,
    TestImage,
    TestNoise,
    TestTensor,
    TestVAE,
)
KINDS += (TestCount, TestAlive, TestOffload, TestUnload)
KINDS += (TestClock, TestClockStop, TestByHand)
NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in KINDS}
