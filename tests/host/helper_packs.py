"""Nodes that change a MODEL, a GUIDER or a SAMPLER as other packs do: copied beside helper_nodes.py, for tests."""

import copy

import torch


class TestOtherPack:
    """The MODEL as another pack would change it: a wrapper that calls by keywords, AnimateDiff's betas, a LoRA, the
    negative prompt at CFG 1 too, as NAG and SAG have it, a network that is compiled already, or linear layers that are
    packed in a way that the host does not know. Other inputs stay in the graph alone."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "how": (["keywords", "betas", "lora", "guided", "compiled", "packed"],)}
        }

    def make(self, model, how, **_):
        changed = model.clone()
        getattr(self, how)(changed)
        return (changed,)

    def keywords(self, model):
        from comfy.patcher_extension import WrappersMP

        def sample(executor, noise, latent_image, sampler, sigmas, *rest, **more):
            more |= dict(zip(("denoise_mask", "callback", "disable_pbar", "seed"), rest, strict=False))
            return executor(noise=noise, latent_image=latent_image, sampler=sampler, sigmas=sigmas, **more)

        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", sample)

    def betas(self, model):
        import comfy.model_sampling

        class Linear(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
            pass

        bar = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0)
        linear = Linear(model.model.model_config)
        linear.set_sigmas(((1 - bar) / bar) ** 0.5)
        model.add_object_patch("model_sampling", linear)

    def lora(self, model):
        """What it puts on the model does not matter here."""

    def guided(self, model):
        model.set_model_sampler_post_cfg_function(lambda run: run["denoised"], disable_cfg1_optimization=True)

    def compiled(self, model):
        model.model = _copied(model.model)
        model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="eager")

    def packed(self, model):
        model.model = _copied(model.model)
        for layer in model.model.diffusion_model.modules():
            if isinstance(layer, torch.nn.Linear):
                halves = torch.zeros(layer.weight.shape[0], layer.weight.shape[1] // 2, dtype=torch.uint8)
                layer.weight = torch.nn.Parameter(halves, requires_grad=False)


def _copied(module):
    """A module of modules of its own, and of the same weights until they are replaced."""
    copied = copy.copy(module)
    copied._modules = {name: each and _copied(each) for name, each in module._modules.items()}
    copied._parameters = dict(module._parameters)
    return copied


class TestGuider:
    """A GUIDER with a list of CFGs, of which it makes nothing."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("GUIDER",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}}

    def make(self, model, positive, negative):
        import comfy.samplers

        class Listed(comfy.samplers.CFGGuider):
            def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (as in the host)
                arguments = (
                    x,
                    timestep,
                    self.conds.get("negative"),
                    self.conds.get("positive"),
                    1.0,
                    model_options,
                    seed,
                )
                return comfy.samplers.sampling_function(self.inner_model, *arguments)

        guider = Listed(model)
        guider.set_conds(positive, negative)
        guider.set_cfg([1.5, 1.0, 1.0, 1.0])
        return (guider,)


class TestNameless:
    """A SAMPLER whose function passes for the host's own and has no name: euler in a wrapping."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        from functools import partial

        import comfy.samplers
        from comfy.k_diffusion.sampling import sample_euler

        euler = partial(sample_euler)
        euler.__module__ = "comfy.test"
        return (comfy.samplers.KSAMPLER(euler),)


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in (TestOtherPack, TestGuider, TestNameless)}
