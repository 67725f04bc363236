"""By symptom: every mistake that people make with few-step LoRAs, and what a node says of it. In tests/:

    python -m host.symptoms

writes docs/symptoms.md; test_symptoms.py makes each mistake and compares what is said, word for word.
"""

from __future__ import annotations

from pathlib import Path

from host.mistakes import (
    CLAMPED,
    KEPT,
    LCM,
    TCD,
    Mistake,
    Shown,
    another_family,
    another_prediction,
    bare_model,
    behind_recipe,
    by_ksampler,
    by_loader,
    by_parts,
    by_sample,
    bypassed,
    core_loader,
    edm_model,
    eight_steps,
    fast_checkpoint,
    graded_mask,
    moved_timesteps,
    other_sampling,
    shifted,
    strength_0,
    two_of_ours,
    unknown_checkpoint,
    with_words,
)

PAGE = Path(__file__).parents[2] / "docs" / "symptoms.md"
NEVER = "This LoRA never saw these sigmas: take "
TWICE = "{} is loaded too, and both speed the model up: remove one."
EULER, PCM = "sampler `euler`, scheduler `simple`; or Sample PCM", "PCM Sampler and PCM Scheduler, or Sample PCM"
SIMPLE = f"{NEVER}scheduler simple, or PCM Scheduler."
MODE = "PCM Sampler's mode is not this LoRA's: set it to 'from recipe'."
MOVED = "ModelSamplingDiscrete (lcm) moves timesteps by up to 10: remove that node."
OTHER_SAMPLING = (  # core's nodes, with the default of their widgets but for what is predicted
    ("ModelSamplingContinuousEDM", "the noise levels", {"sampling": "eps", "sigma_max": 120.0, "sigma_min": 0.002}),
    (
        "ModelSamplingContinuousV",
        "the noise levels",
        {"sampling": "v_prediction", "sigma_max": 500.0, "sigma_min": 0.03},
    ),
    ("ModelSamplingDiscrete", "what the model predicts", {"sampling": "v_prediction", "zsnr": False}),
)
BARE_MODEL = "No few-step LoRA here: the bare model is drawn. Is one merged in? Add PCM Recipe."
NO_RECIPE = (
    "No recipe is connected, and the model carries none: connect the recipe of Load PCM LoRA, which may be bypassed. "
    "For a model with a few-step LoRA merged in, put PCM Recipe after its loader."
)
SUITS = "Sampler {} does not suit this LoRA: take {}PCM Sampler."

MISTAKES: dict[str, tuple[Mistake | Shown, ...]] = {
    "mush, noise left": (
        Mistake("KSampler with scheduler `karras`", SIMPLE, EULER, by_ksampler(scheduler="karras")),
        Mistake("PCM Sampler with sigmas of `normal`", SIMPLE, PCM, by_parts("normal")),
        Mistake(
            "KSampler with scheduler `beta` for an LCM file",
            SIMPLE,
            "`lcm` and `simple`, or Sample PCM",
            by_ksampler(LCM, scheduler="beta", sampler_name="lcm"),
        ),
        Mistake(
            "sampler `lcm` for a deterministic LoRA",
            SUITS.format("lcm", "euler, or "),
            EULER,
            by_ksampler(sampler_name="lcm"),
        ),
        Mistake(
            "sampler `euler` for an LCM file",
            SUITS.format("euler", "lcm, or "),
            "sampler `lcm`; or Sample PCM",
            by_ksampler(LCM),
        ),
        Mistake(
            "a core sampler for a TCD file",
            SUITS.format("heun", ""),
            f"{PCM}: core has no gamma; `euler` is 0 and `lcm` 1",
            by_ksampler(TCD, sampler_name="heun"),
        ),
        Mistake(
            "a core sampler for a one-step LoRA that was trained with a clamp",
            SUITS.format("euler", ""),
            PCM,
            by_ksampler(CLAMPED, steps=1),
        ),
        Mistake(
            "PCM Sampler in the mode `stochastic` for a deterministic LoRA",
            MODE,
            "the mode `from recipe`",
            by_parts("simple", "stochastic"),
        ),
        Mistake(
            "ModelSamplingDiscrete (lcm) for a LoRA with even levels, in Sample PCM",
            MOVED,
            "no such node",
            lambda: moved_timesteps("PCMSample"),
        ),
        Mistake(
            "ModelSamplingDiscrete (lcm) for a LoRA with even levels, in KSampler",
            MOVED,
            "no such node",
            lambda: moved_timesteps("KSampler"),
        ),
        *(
            Mistake(
                f"{node} after Load PCM LoRA, in {title}",
                f"{node} changes {changes}: remove that node.",
                "no such node",
                other_sampling(node, kind, **widgets),
            )
            for kind, title in (("PCMSample", "Sample PCM"), ("KSampler", "KSampler"))
            for node, changes, widgets in OTHER_SAMPLING
        ),
        Mistake(
            "an EDM checkpoint, such as CosXL or Playground 2.5",
            "An EDM model (CosXL, Playground 2.5): no LoRA here knows its noise levels. Take another.",
            "an ordinary SDXL checkpoint",
            edm_model,
        ),
        Mistake(
            "a LoRA of another family",
            "sdxl.safetensors is a LoRA for SDXL, but the model is SD1.5. Load a model of SDXL, or a LoRA made for "
            "SD1.5.",
            "a checkpoint of its family",
            another_family,
        ),
        Mistake(
            "a v-prediction checkpoint under a LoRA for ordinary ones",
            "Made for models that predict noise, not this kind: load another checkpoint.",
            "another checkpoint",
            another_prediction,
        ),
        Mistake(
            "Load PCM LoRA bypassed (Ctrl+B)",
            BARE_MODEL,
            "nothing, to see the picture without the LoRA; PCM Recipe for a checkpoint that has such a LoRA merged in",
            bypassed,
        ),
        Mistake(
            "a merged checkpoint of which nothing is known",
            "Nothing is known of this model: choose its method in recipe, or widgets for your own.",
            "the method, in PCM Recipe",
            unknown_checkpoint,
        ),
        Mistake(
            "the recipe connected, but the model from the checkpoint",
            "No few-step LoRA on this model: connect that of Load PCM LoRA, unless one is merged in.",
            "both outputs of Load PCM LoRA",
            bare_model,
        ),
        Mistake(
            "Load PCM LoRA at strength 0",
            "The LoRA is off: set the strength of Load PCM LoRA to 1.",
            "strength 1; or KSampler with 25 steps for the bare model",
            strength_0,
        ),
        Mistake(
            "a file of which nothing is known",
            "Nothing is known of this file: set its phases, mode and cfg, and recipe to widgets.",
            "the widgets, once: PCM Stamp Recipe keeps them",
            by_loader("unnamed.safetensors"),
        ),
    ),
    "washed out, low contrast, no composition": (
        Mistake(
            "KSampler with scheduler `ddim_uniform`, which never starts from noise",
            SIMPLE,
            EULER,
            by_ksampler(scheduler="ddim_uniform"),
        ),
        Mistake("PCM Sampler with sigmas of `ddim_uniform`", SIMPLE, PCM, by_parts("ddim_uniform")),
    ),
    "burnt, saturated": (
        Mistake(
            "CFG 7 in Sample PCM",
            "CFG 7 is above 2 and burns the image: set CFG to 1.",
            "cfg 0: the LoRA's own",
            by_sample(cfg=7.0),
        ),
        Mistake(
            "CFG 7 in KSampler",
            "CFG 7 is above 2 and burns the image: set CFG to 1.",
            "the CFG said",
            by_ksampler(cfg=7.0),
        ),
        Mistake(
            "two few-step LoRAs, both by Load PCM LoRA", TWICE.format("kohya.safetensors"), "one of them", two_of_ours
        ),
        Mistake(
            "another one by core's LoRA loader, before", TWICE.format(LCM), "one of them", lambda: core_loader("before")
        ),
        Mistake(
            "another one by core's LoRA loader, after", TWICE.format(LCM), "one of them", lambda: core_loader("after")
        ),
        Mistake(
            "another one by core's LoRA loader, after, in KSampler",
            TWICE.format(LCM),
            "one of them",
            lambda: core_loader("after", by_core=True),
        ),
        Shown(
            "CFG above 1 for a LoRA whose guidance is distilled in, such as FLUX's",
            "CFG 1, and FluxGuidance for the rest: Sample PCM and Load PCM LoRA say so",
            "test_family_mistakes.py::test_true_cfg_on_distilled_guidance",
        ),
        Shown(
            "FluxGuidance missing, far off, or there twice",
            "one FluxGuidance, with the number that Sample PCM says",
            "test_family_mistakes.py::test_guidance_of_the_network",
        ),
        Shown(
            "another one by rgthree's, Efficiency's or Lora-Manager's loaders, by a stacker, or in a prompt's words",
            "one of them: Load PCM LoRA and Sample PCM say which",
            "test_loader.py::test_a_few_step_lora_of_another_packs_loader_is_told",
        ),
        Mistake(
            "a few-step LoRA on a checkpoint that is made for few steps",
            "tiny_LCM.safetensors is a few-step model by its name: take a plain one, or no LoRA.",
            "a plain checkpoint; or PCM Recipe and no LoRA",
            fast_checkpoint,
        ),
        Mistake(
            "a few-step LoRA on a model whose method is chosen in PCM Recipe",
            "PCM Recipe says that this model is made for few steps: remove that node, or this one.",
            "one of the two",
            behind_recipe,
        ),
    ),
    "negative prompt ignored": (
        Mistake(
            "CFG 1, with words in the negative prompt",
            "CFG 1 does not use the negative prompt: clear it, or take a LoRA made for CFG.",
            "a file with normalcfg or CFG in its name, at its CFG",
            with_words,
        ),
        Mistake(
            "CFG 1 for a LoRA that is made for CFG",
            "CFG 1 is below 5 and leaves the negative prompt unused: set CFG to 5.",
            "the CFG said",
            lambda: with_words(KEPT),
        ),
    ),
    "a warning that is none": (
        Shown(
            "CFG 7 under RescaleCFG, APG, Mahiro, CFGNorm, CFGZeroStar or TCFG, which hold it down",
            "nothing: it is no mistake",
            "test_guidance.py::test_a_tamed_cfg_is_no_mistake",
        ),
        Shown(
            "a negative prompt at CFG 1 under NAG, SAG and the like, which use it",
            "nothing: it is no mistake",
            "test_guidance.py::test_a_negative_prompt_that_is_used_at_cfg_1_is_no_mistake",
        ),
        Shown(
            "an inpainting checkpoint, whose first convolution has nine inputs",
            "nothing: the LoRA is taken whole, and PCM Inpaint gives the model its picture and mask",
            "test_inpainting.py::test_a_lora_of_the_plain_model_is_taken_whole",
        ),
    ),
    "not what diffusers draws": (
        Mistake(
            "CFG 0, as diffusers' guidance 0: in ComfyUI that is the negative prompt alone",
            "CFG 0 is below 1: set CFG to 1.",
            "CFG 1 for diffusers' 0",
            by_ksampler(cfg=0.0),
        ),
        Shown(
            "other levels, noise or rounding",
            "Sample PCM, or what PCM LoRA Info says for diffusers: the same picture to 1e-5",
            "test_sampling.py::test_deterministic_is_diffusers_ddim_on_merged_weights",
        ),
    ),
    "is eta 0 or 1 the noisy one?": (
        Mistake(
            "TCD's gamma, which diffusers calls eta",
            "0 is deterministic, 1 all noise fresh; TCD uses 0.3.",
            "the mode `from recipe`",
            tooltip=("PCMSampler", "gamma"),
        ),
        Mistake(
            "another gamma than the LoRA's",
            MODE,
            "the mode `from recipe`",
            by_parts("simple", "gamma", "stochastic.safetensors"),
        ),
    ),
    "image to image too strong or too weak": (
        Mistake(
            "a denoise between two levels",
            "denoise 0.4 starts at the nearest phase edge, which is 0.5: 2 of 4 steps.",
            "0.25, 0.5 or 0.75 for a 4-step LoRA",
            by_sample(picture=True, denoise=0.4),
            is_fact=True,
        ),
        Mistake(
            "KSampler with denoise 0.5, whose levels lie between the LoRA's",
            "This LoRA never saw these sigmas: for denoise 0.5 set steps to 2, scheduler simple.",
            "the steps said, or Sample PCM",
            by_ksampler(picture=True, denoise=0.5),
        ),
        Mistake(
            "DifferentialDiffusion with PCM Inpaint",
            "DifferentialDiffusion does nothing here: use Sample PCM with Set Latent Noise Mask.",
            "Sample PCM, whose mask may be grey",
            graded_mask,
        ),
        Mistake(
            "denoise below 1 with an empty latent",
            "The latent is empty: set denoise to 1, or connect a picture by VAE Encode.",
            "one of the two",
            by_sample(denoise=0.5),
        ),
    ),
    "more steps do not help": (
        Mistake(
            "20 steps for a LoRA whose noise is all fresh at each",
            "More than 8 steps make this LoRA's pictures plainer: set steps to 4.",
            "4 to 8 steps, or a deterministic LoRA",
            by_sample(LCM, steps=20),
        ),
    ),
    "wrong number of steps for the file": (
        Mistake(
            "2 steps for a 4-step LoRA",
            "This LoRA was made for 4 steps, not 2: set steps to 4.",
            "steps 0: the LoRA's own",
            by_sample(steps=2),
        ),
        Mistake(
            "20 steps in KSampler",
            "This LoRA was made for 4 steps, not 20: set steps to 4.",
            "the steps said",
            by_ksampler(steps=20),
        ),
        Mistake(
            "8 steps in PCM Scheduler",
            "This LoRA was made for 4 steps, not 8: set steps to 4.",
            "steps 0: the LoRA's own",
            eight_steps,
        ),
        Mistake(
            "a one-step LoRA at 4 steps",
            "This LoRA was made for 1 step, not 4: set steps to 1.",
            "1 step",
            by_sample(CLAMPED, steps=4),
        ),
    ),
    "the LoRA does little or nothing": (
        Mistake(
            "a file of which a part has no place in the model",
            "18 of 73 modules have no place in this model: take a LoRA made for it.",
            "a LoRA for this kind of model",
            by_loader("partly.safetensors"),
        ),
        Mistake(
            "a file that fits nothing",
            "nowhere.safetensors does nothing to this SD1.5 model: 55 of 55 modules have no place in this model: take "
            "a LoRA made for it. Its names are like lora_unet_down_towers_0_attentions_0_proj_in.",
            "a LoRA for this kind of model",
            by_loader("nowhere.safetensors"),
        ),
        Mistake(
            "strength 0",
            "Strength 0: the LoRA is off, and the model is as it came.",
            "strength 1",
            by_loader(strength=0.0),
        ),
        Shown(
            "LoHa, LoKr, DoRA and other kinds, or a base in fp8, int8, NVFP4 or GGUF",
            "Load PCM LoRA, which hands the host all of a module: what core makes of it, to the bit",
            "test_lora_kinds.py::test_every_kind_is_what_core_makes_of_it",
        ),
        Shown(
            "a model that is compiled already, of which core's loader takes nothing without a word",
            "Load PCM LoRA before the node that compiles, as it says",
            "test_lora_kinds.py::test_a_model_that_takes_nothing_is_the_cause",
        ),
        Shown(
            "core's LoRA loader, which drops what it cannot name: all attention of a PEFT file",
            "Load PCM LoRA, which names them all and counts them",
            "test_loader.py::test_the_host_alone_drops_half_of_a_peft_file",
        ),
    ),
    "many times too strong or too weak": (
        Mistake(
            "a strength far from the LoRA's",
            "Made for strength 1, not 2: set strength to 1.",
            "the strength said",
            by_loader(strength=2.0),
        ),
        Mistake(
            "alpha lost on the way, in a part of the file",
            "10 of 73 modules have lost their alpha: get the file again.",
            "the file as it was published",
            by_loader("half_alpha.safetensors"),
        ),
        Shown(
            "alpha where the host does not look, in the header of a PEFT file",
            "Load PCM LoRA, which does; one that is nowhere cannot be known, and the node says that there is none",
            "test_loader.py::test_key_styles_give_the_same_picture",
        ),
    ),
    "other pictures on another machine": (
        Shown(
            "another picture in a batch than alone, in stochastic modes",
            "nothing: noise between steps is each picture's own",
            "test_batches.py::test_one_seed_is_one_picture_where_noise_is_fresh",
        ),
        Mistake(
            "noise from the device, or from what ran before",
            "One seed is one picture, on every device.",
            "nothing: all noise comes from the seed, on the CPU",
            tooltip=("PCMSample", "seed"),
        ),
    ),
    "blurry": (
        Mistake("KSampler with `heun`", SUITS.format("heun", "euler, or "), EULER, by_ksampler(sampler_name="heun")),
        Mistake(
            "`dpmpp_sde` for an LCM file",
            SUITS.format("dpmpp_sde", "lcm, or "),
            "sampler `lcm`; or Sample PCM",
            by_ksampler(LCM, sampler_name="dpmpp_sde"),
        ),
    ),
    "a flow LoRA looks wrong": (
        Mistake(
            "another shift than its own, in KSampler",
            "Shift 5 is not this LoRA's: remove the node that sets it.",
            "no ModelSamplingSD3",
            lambda: shifted("KSampler"),
        ),
        Mistake(
            "another shift than its own, in Sample PCM",
            "Shift 5 is not used, the LoRA's is 1: remove the node that sets it.",
            "no ModelSamplingSD3",
            lambda: shifted("PCMSample"),
        ),
        Shown(
            "the LoRA's own sigmas are not the scheduler's",
            "PCM Scheduler, or Sample PCM",
            "test_flow.py::test_sigmas_follow_the_recipes_shift",
        ),
        Shown(
            "one of Wan 2.2's experts is missing, or the two are swapped",
            "both, each with its own LoRA: Sample PCM says which is where",
            "test_families.py::test_two_experts_are_cores_two_samplers",
        ),
        Shown(
            "FLUX.2 Turbo's numbers taken for noise levels",
            "Sample PCM: they are shifted by the size of the picture first",
            "test_families.py::test_flux2_turbo_is_shifted_by_the_size_of_the_picture",
        ),
        Shown(
            "ModelSamplingLTXV or ModelSamplingFlux has worked its shift out for other frames or another size",
            "the latent that is sampled connected to it, or its size: Sample PCM and Load PCM LoRA say so",
            "test_family_mistakes.py::test_a_shift_that_was_worked_out_for_another_clip",
        ),
        Shown(
            "a clip for a model that draws pictures, or that draws a clip frame by frame",
            "one frame, or core's SamplerARVideo: the sampling node says which",
            "test_family_mistakes.py::test_a_clip_for_a_model_of_pictures",
        ),
    ),
}
TOP = """\
# By symptom

What goes wrong with few-step LoRAs, and what the nodes say of it, word for word. `tests/host/test_symptoms.py` makes
each mistake in a real ComfyUI. Load PCM LoRA looks on whenever its model is sampled, by core's KSampler too, and says
what does not fit; it changes nothing.

| symptom | cause | said by | in these words | take |
|---|---|---|---|---|
"""


def page() -> str:
    """The table of docs/symptoms.md."""
    rows = [(symptom, *_cells(row)) for symptom, rows in MISTAKES.items() for row in rows]
    return TOP + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(row: Mistake | Shown) -> tuple[str, ...]:
    if isinstance(row, Shown):
        return row.cause, "no node", f"shown by `tests/host/{row.test}`", row.do
    return row.cause, row.speaker, row.said, row.do


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
