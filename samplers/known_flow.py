"""The rows of the table of published few-step files for transformers that are flow models, and for what came later."""

from __future__ import annotations

import math

from .known_table import DISTILLED, HUB, HYPER_SD, STOCHASTIC, TRAILING, KnownFiles

DIFFUSERS = "https://github.com/huggingface/diffusers/blob/main/src/diffusers/pipelines/"
LIGHTX2V = "https://github.com/ModelTC/LightX2V/tree/main/configs/distill/"
CORE_TEMPLATES = "https://github.com/Comfy-Org/workflow_templates/blob/main/templates/"
EVEN = TRAILING | {"prediction": "flow"}  # steps of one length, before the shift
NO_CFG = {"guidance_max": 1.0}  # the guidance is distilled in, and CFG beside it burns
FLUX_MU = ((256, 0.5), (4096, 1.15))
FLUX = EVEN | NO_CFG | {"shift": math.exp(1.15), "mu_by_size": FLUX_MU}
FAST_WAN = {"prediction": "flow", "points": 1000, "shift": 8.0, "sigmas": (1.0, 0.757, 0.522)} | NO_CFG
WAN_LIST = {"prediction": "flow", "points": 1000, "shift": 5.0, "timesteps": (1000, 750, 500, 250)} | NO_CFG
LTX2_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
FLUX2_TURBO = (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031)
FLUX2_EDGE = 4300  # positions up to which FLUX.2's mu hangs on the number of steps


def flux2_mu(steps: int) -> tuple[tuple[float, float], ...]:
    """FLUX.2's mu by the size of the picture (`Recipe.mu_by_size`), in so many steps.

    Its authors have fitted one line for 10 steps and one for 200, and go between them with the number of steps; above
    4300 positions they take that of 200 steps for any.
    """

    def line_10(positions: int) -> float:
        return 8.73809524e-05 * positions + 1.89833333

    def line_200(positions: int) -> float:
        return 0.00016927 * positions + 0.45666666

    def mu(positions: int) -> float:
        return line_200(positions) + (line_10(positions) - line_200(positions)) * (200 - steps) / 190

    above = ((positions, line_200(positions)) for positions in (FLUX2_EDGE + 1, 2 * FLUX2_EDGE))
    return ((0, mu(0)), (FLUX2_EDGE, mu(FLUX2_EDGE)), *above)


def flux2(steps: int) -> dict:
    """The shift of FLUX.2 in so many steps: that of 1024 x 1024, and by the size."""
    line = flux2_mu(steps)
    usual = line[0][1] + (line[1][1] - line[0][1]) * 4096 / FLUX2_EDGE
    return {"prediction": "flow", "points": 1000, "shift": math.exp(usual), "mu_by_size": line} | NO_CFG


def hidream(steps: int, shift: float) -> dict:
    """HiDream's levels in so many steps: times of one length from 1 down to the least noise level that there is, that
    of time 0.001, which is then shifted a second time; fresh noise on each."""
    least = shift * 0.001 / (1 + (shift - 1) * 0.001)
    times = tuple(1000 * (1 + (least - 1) * i / (steps - 1)) for i in range(steps))
    return {"prediction": "flow", "points": 1000, "shift": shift, "timesteps": times, "mode": "stochastic"} | NO_CFG


# Settings as seen in 2026-11 in the authors' repositories, or where marked (*) in copies of their pages and as others
# quote them. No file was opened. Which files are missing, and why: docs/settings.md.
# - ByteDance/Hyper-SD (*): Hyper-FLUX at strength 0.125 and guidance 3.5, on diffusers' levels for FLUX.1.
# - alimama-creative/FLUX.1-Turbo-Alpha (*): 8 steps, guidance 3.5, strength 1.
# - fal/FLUX.2-dev-Turbo (*): guidance 2.5 and eight numbers as the argument `sigmas` of diffusers' pipeline,
#   "pre-shifted" in its authors' words: diffusers shifts them by FLUX.2's mu, so that they are times, not noise levels.
# - RED-AIGC/TDD, by the README of RedAIGC/Target-Driven-Distillation: its FLUX.1 file at strength 0.125, guidance 2, 8
#   steps; SDXL's is in known_table.
# - ModelTC/Qwen-Image-Lightning: shift 3 (base_shift and max_shift are log 3), no true CFG; V1, V2 and Edit alike.
# - ModelTC/LightX2V, configs and schedulers: both at shift 5 and times 1000, 750, 500, 250; Wan 2.1's puts fresh noise
#   on each level, Wan 2.2's does not. Wan 2.2 changes its expert after two steps, which is where Wan itself does, at
#   0.875 for text to video and 0.9 for image to video.
# - alibaba-pai/Z-Image-Fun-Lora-Distill (*): 8 steps, CFG 1, strength 0.8. Tongyi-MAI/Z-Image-Turbo: 8 steps.
# - Lightricks/LTX-2: the sigmas of the distilled model and LoRA, in diffusers' pipelines/ltx2/utils.py.
# - black-forest-labs/FLUX.1-schnell, FLUX.2-klein: 4 steps, in the examples of diffusers' pipelines.
# - stabilityai/stable-diffusion-3.5-large-turbo: 4 steps, CFG 1, shift 3, in Stability-AI/sd3.5's sd3_infer.py.
# - Luo-Yihong/TDM, README: 4 steps, CFG 1; SD3's at strength 0.125 and shift 6, Dreamshaper's at the levels that
#   DPM-Solver takes with SD1.5's own settings. Its authors sample by DPM-Solver++ of order 2; these steps are Euler's.
# - hao-ai-lab/FastVideo, configs/pipelines/wan.py, and tianweiy/CausVid, configs/wan_bidirectional_dmd.yaml: noise
#   levels of 1000, 757 and 522 thousandths as they are, fresh noise on each, no CFG.
# - CausVid's causal model is sampled frame by frame. Kijai's LoRA, which was taken out of it, is not: by ComfyUI's
#   template for VACE it has 4 even steps at shift 8, CFG 1, strength 0.7, by UniPC; these steps are Euler's.
# - circlestone-labs/Anima, by ComfyUI's template: the turbo LoRA in 8 steps of euler and simple, CFG 1, on the model's
#   own shift 3.
# - krea-ai/krea-2, README and krea2/inference/sampling.py: Turbo in 8 even steps, no CFG, mu 1.15 at every size.
# - HiDream-ai/HiDream-I1, inference.py and flash_flow_match.py: Dev in 28 steps at shift 6, Fast in 16 at shift 3, both
#   without CFG and with fresh noise on each level. As ComfyUI's templates: lcm, normal, ModelSamplingSD3.
# - wangfuyun/AnimateLCM: LCM in 6 steps, CFG 2, strength 0.8, in G-U-N/AnimateLCM's README.
DIT_FILES = (
    KnownFiles(
        r"\bhyper ?flux.*\b(?P<steps>8|16) ?steps?\b",
        HYPER_SD,
        ("flux",),
        "hyper",
        FLUX | {"strength": 0.125, "embedded_guidance": 3.5},
    ),
    KnownFiles(
        r"\bflux ?1? ?(?:dev )?turbo alpha\b",
        f"{HUB}alimama-creative/FLUX.1-Turbo-Alpha",
        ("flux",),
        "turbo",
        FLUX | {"phases": 8, "embedded_guidance": 3.5},
    ),
    KnownFiles(
        r"\bflux ?1? dev tdd\b",
        f"{HUB}RED-AIGC/TDD",
        ("flux",),
        "tdd",
        FLUX | {"phases": 8, "strength": 0.125, "embedded_guidance": 2.0},
    ),
    KnownFiles(
        r"\bflux ?1? schnell\b",
        f"{DIFFUSERS}flux/pipeline_flux.py",
        ("flux",),
        "schnell",
        EVEN | NO_CFG | {"phases": 4, "shift": 1.0},
        is_checkpoint=True,
    ),
    KnownFiles(
        r"\bflux ?2 ?(?:dev )?turbo",
        f"{HUB}fal/FLUX.2-dev-Turbo",
        ("flux2",),
        "turbo",
        flux2(8) | {"timesteps": tuple(1000 * time for time in FLUX2_TURBO), "embedded_guidance": 2.5},
    ),
    KnownFiles(
        r"\bflux ?2 klein\b(?!.*\bbase\b)",
        f"{DIFFUSERS}flux2/pipeline_flux2_klein_kv.py",
        ("flux2",),
        "klein",
        TRAILING | flux2(4) | {"phases": 4},
        is_checkpoint=True,
    ),
    KnownFiles(
        r"\bqwen.*\blightning\b.*\b(?P<steps>4|8) ?steps?\b",
        "https://github.com/ModelTC/Qwen-Image-Lightning",
        ("qwen_image",),
        "lightning",
        EVEN | NO_CFG | {"shift": 3.0},
    ),
    *(
        KnownFiles(
            rf"^(?=.*\bwan ?2 ?2\b)(?=.*\b(?:lightning|lightx2v|seko)\b)(?=.*\b4 ?steps?\b)(?=.*\b{task}\b)"
            r".*\b(?P<expert>high|low)\b",
            f"{LIGHTX2V}wan22",
            ("wan2.1",),
            "lightning",
            WAN_LIST | {"boundary": boundary},
        )
        for task, boundary in (("t2v", 0.875), ("i2v", 0.9))
    ),
    KnownFiles(
        r"^(?!.*\bwan ?2 ?2\b)(?!.*\b(?:high|low)\b)(?=.*\b(?:step distill|4 ?steps?|stepdistill)\b).*\blightx2v\b",
        f"{LIGHTX2V}wan21",
        ("wan2.1",),
        "lightning",
        WAN_LIST | {"mode": "stochastic"},
    ),
    KnownFiles(
        r"\bfast ?wan|\bcaus ?vid bidirect",
        "https://github.com/hao-ai-lab/FastVideo/blob/main/fastvideo/configs/pipelines/wan.py",
        ("wan2.1",),
        "dmd",
        FAST_WAN | {"mode": "stochastic"},
    ),
    KnownFiles(
        r"^(?!.*\bbidirect).*\bcaus ?vid 14b\b.*\blora\b",
        f"{CORE_TEMPLATES}video_wan_vace_14B_t2v.json",
        ("wan2.1",),
        "causvid",
        EVEN | NO_CFG | {"phases": 4, "shift": 8.0, "strength": 0.7},
    ),
    KnownFiles(
        r"\banima turbo lora\b",
        f"{CORE_TEMPLATES}image_anima_base_v1.json",
        ("anima",),
        "turbo",
        EVEN | NO_CFG | {"phases": 8, "shift": 3.0},
    ),
    KnownFiles(
        r"\bkrea ?2 turbo\b",
        "https://github.com/krea-ai/krea-2",
        ("krea2",),
        "turbo",
        EVEN | NO_CFG | {"phases": 8, "shift": math.exp(1.15)},
        is_checkpoint=True,
    ),
    *(
        KnownFiles(
            rf"\bhidream i1 {kind}\b",
            "https://github.com/HiDream-ai/HiDream-I1/blob/main/inference.py",
            ("hidream",),
            "distilled",
            hidream(steps, shift),
            is_checkpoint=True,
        )
        for kind, steps, shift in (("dev", 28, 6.0), ("fast", 16, 3.0))
    ),
    KnownFiles(
        r"\bz ?image fun lora distill (?P<steps>8) ?steps?\b",
        f"{HUB}alibaba-pai/Z-Image-Fun-Lora-Distill",
        ("lumina2",),
        "distilled",
        EVEN | NO_CFG | {"shift": 3.0, "strength": 0.8},
    ),
    KnownFiles(
        r"\bz ?image turbo\b",
        f"{DIFFUSERS}z_image/pipeline_z_image.py",
        ("lumina2",),
        "turbo",
        EVEN | NO_CFG | {"shift": 3.0, "phases": 8},
        is_checkpoint=True,
    ),
    KnownFiles(
        r"\bltx ?2\b.*\bdistilled\b",
        f"{DIFFUSERS}ltx2/utils.py",
        ("ltxav",),
        "distilled",
        NO_CFG | {"prediction": "flow", "points": 1000, "shift": math.exp(2.37), "sigmas": LTX2_SIGMAS},
    ),
    KnownFiles(
        r"\bsd ?3 ?5 large turbo\b",
        "https://github.com/Stability-AI/sd3.5",
        ("sd3",),
        "turbo",
        EVEN | {"phases": 4},
        is_checkpoint=True,
    ),
    KnownFiles(
        r"\btdm sd ?3\b",
        f"{HUB}Luo-Yihong/TDM_sd3_lora",
        ("sd3",),
        "tdm",
        EVEN | {"phases": 4, "shift": 6.0, "strength": 0.125},
    ),
    KnownFiles(
        r"\btdm dreamshaper\b",
        "https://github.com/Luo-Yihong/TDM",
        ("sd15",),
        "tdm",
        NO_CFG | {"points": 1000, "timesteps": (999, 749, 500, 250)},
    ),
    KnownFiles(
        r"\banimatelcm sd15 t2v lora\b",
        "https://github.com/G-U-N/AnimateLCM",
        ("sd15",),
        "lcm",
        DISTILLED | STOCHASTIC | {"steps": 6, "strength": 0.8, "guidance": 2.0, "guidance_max": 3.0},
    ),
)
