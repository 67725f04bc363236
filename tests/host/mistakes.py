"""The mistakes that people make with few-step LoRAs, as graphs; `symptoms` is the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from host.graphs import custom, edit, ksampler, loaded, pcm_sampler, picture, sample, scheduler
from host.server import Graph, out

TITLES = {
    "PCMLoadLora": "Load PCM LoRA",
    "PCMRecipe": "PCM Recipe",
    "PCMInpaint": "PCM Inpaint",
    "PCMSample": "Sample PCM",
    "PCMScheduler": "PCM Scheduler",
    "PCMSampler": "PCM Sampler",
}
CLAMPED, TCD = "clamped.safetensors", "TCD-SD15-LoRA.safetensors"
LCM, KEPT = "lcm-lora-sdv1-5.safetensors", "Hyper-SD15-8steps-CFG-lora.safetensors"
Made = tuple[Graph, str]  # a graph, and the node in it that says something


@dataclass(frozen=True)
class Mistake:
    """One mistake. cause: what was done. said: the first line on the node, or the refusal's first line; or what a
    tooltip of a node ends with. do: what to take instead.

    make: the graph. tooltip: of which input, (node, input), where no node can see the mistake. is_fact: whether the
    node tells it without the mark of a warning.
    """

    cause: str
    said: str
    do: str
    make: Callable[[], Made] | None = None
    tooltip: tuple[str, str] | None = None
    is_fact: bool = False

    @property
    def speaker(self) -> str:
        if self.tooltip:
            return f"{TITLES[self.tooltip[0]]}, tooltip of `{self.tooltip[1]}`"
        graph, node = self.make()
        return TITLES[graph[node]["class_type"]]


@dataclass(frozen=True)
class Shown:
    """What no node can see, and the test that shows what the pack does about it."""

    cause: str
    do: str
    test: str


def by_loader(lora: str = "kohya.safetensors", **widgets: Any) -> Callable[[], Made]:
    def make() -> Made:
        graph, links = loaded(lora, **widgets)
        sample(graph, links, steps=1)
        return graph, links["model"][0]

    return make


def with_latent(lora: str, picture: bool) -> tuple[Graph, dict[str, list]]:
    """What `loaded` has; its latent is a picture's, or empty."""
    graph, links = loaded(lora)
    if picture:
        links["latent"] = out(graph.add("TestLatent", seed=3, batch=1))
    return graph, links


def by_ksampler(lora: str = "kohya.safetensors", picture: bool = False, **settings: Any) -> Callable[[], Made]:
    """Core's KSampler, which our loader watches."""

    def make() -> Made:
        graph, links = with_latent(lora, picture)
        ksampler(graph, links, **settings)
        return graph, links["model"][0]

    return make


def by_sample(lora: str = "kohya.safetensors", picture: bool = False, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        graph, links = with_latent(lora, picture)
        return graph, sample(graph, links, **settings)

    return make


def by_parts(sigmas: str, mode: str = "from recipe", lora: str = "kohya.safetensors") -> Callable[[], Made]:
    """PCM Sampler with the sigmas of core's scheduler of this name."""

    def make() -> Made:
        graph, links = loaded(lora)
        basic = graph.add("BasicScheduler", model=links["model"], scheduler=sigmas, steps=4, denoise=1.0)
        custom(graph, links, pcm_sampler(graph, mode, recipe=links["recipe"]), out(basic))
        return graph, links["model"][0]

    return make


def eight_steps() -> Made:
    graph, links = loaded()
    node = scheduler(graph, links, steps=8)
    custom(graph, links, pcm_sampler(graph, "from recipe", recipe=links["recipe"]), out(node))
    return graph, node


def another_family() -> Made:
    graph, links = loaded("sdxl.safetensors")
    sample(graph, links)
    return graph, links["model"][0]


def another_prediction() -> Made:
    graph, links = loaded("sdxl_kohya.safetensors", "sdxl_v.safetensors", 2048, 1280)
    sample(graph, links, steps=1)
    return graph, links["model"][0]


def moved_timesteps(node: str) -> Made:
    """A ModelSamplingDiscrete (lcm) after our loader, with Sample PCM or core's KSampler."""
    graph, links = loaded()
    links["model"], loader = discrete(graph, links["model"]), links["model"][0]
    if node == "PCMSample":
        return graph, sample(graph, links)
    ksampler(graph, links)
    return graph, loader


def discrete(graph: Graph, model: list) -> list:
    """The model with the 50 timesteps that LCM was trained on, by core's node."""
    return out(graph.add("ModelSamplingDiscrete", model=model, sampling="lcm", zsnr=False))


def other_sampling(kind: str, node: str, **widgets: Any) -> Callable[[], Made]:
    """One of core's ModelSampling nodes after our loader, with Sample PCM or core's KSampler."""

    def make() -> Made:
        graph, links = loaded()
        links["model"], loader = out(graph.add(kind, model=links["model"], **widgets)), links["model"][0]
        if node == "PCMSample":
            return graph, sample(graph, links)
        ksampler(graph, links)
        return graph, loader

    return make


def edm_model() -> Made:
    """A checkpoint with CosXL's mark."""
    graph, links = loaded("sdxl_kohya.safetensors", "cosxl.safetensors", 2048, 1280)
    sample(graph, links, steps=1)
    return graph, links["model"][0]


def graded_mask() -> Made:
    graph, links = loaded()
    links["model"] = out(graph.add("DifferentialDiffusion", model=links["model"]))
    node = edit(graph, links, "Inpaint", **picture(graph))
    graph.add("SaveImage", images=out(node), filename_prefix="test")
    return graph, node


def bypassed() -> Made:
    """Load PCM LoRA bypassed, as the frontend queues it."""
    graph, links = loaded()
    node = sample(graph, links | {"model": links["base"]})
    del graph[node]["inputs"]["recipe"]
    return graph, node


def fast_checkpoint() -> Made:
    graph, links = loaded(checkpoint="tiny_LCM.safetensors")
    sample(graph, links, steps=1)
    return graph, links["model"][0]


def unknown_checkpoint() -> Made:
    graph, links = loaded()
    node = _recipe(graph, links, "auto")
    sample(graph, links | {"model": out(node), "recipe": out(node, 1)}, steps=1)
    return graph, node


def behind_recipe() -> Made:
    graph, links = loaded()
    loader = links["model"][0]
    graph[loader]["inputs"]["model"] = out(_recipe(graph, links, "LCM"))
    sample(graph, links, steps=1)
    return graph, loader


def _recipe(graph: Graph, links: dict[str, list], recipe: str) -> str:
    widgets = {"phases": 4, "mode": "deterministic", "cfg": 1.0}
    return graph.add("PCMRecipe", model=links["base"], recipe=recipe, **widgets)


def bare_model() -> Made:
    graph, links = loaded()
    return graph, sample(graph, {**links, "model": links["base"]})


def strength_0() -> Made:
    graph, links = loaded(strength=0.0)
    return graph, sample(graph, links)


def with_words(lora: str = "kohya.safetensors") -> Made:
    graph, links = loaded(lora)
    graph[links["negative"][0]]["inputs"]["text"] = "blurry, ugly"
    return graph, sample(graph, links, cfg=1.0)


def two_of_ours() -> Made:
    graph, links = loaded()
    second = graph.add("PCMLoadLora", **graph[links["model"][0]]["inputs"] | {"model": links["model"], "lora": TCD})
    sample(graph, {**links, "model": out(second)}, steps=1)
    return graph, second


def core_loader(place: str, by_core: bool = False) -> Made:
    """Another few-step LoRA by core's loader, before ours or after it, for Sample PCM or core's KSampler."""
    graph, links = loaded()
    ours = links["model"][0]
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name=LCM, strength_model=1.0)
    if place == "before":
        graph[ours]["inputs"]["model"] = out(core)
        sample(graph, links, steps=1)
        return graph, ours
    graph[core]["inputs"]["model"] = links["model"]
    if by_core:
        ksampler(graph, {**links, "model": out(core)})
        return graph, ours
    return graph, sample(graph, {**links, "model": out(core)})


def shifted(node: str) -> Made:
    """A ModelSamplingSD3 after our loader, with Sample PCM or core's KSampler."""
    graph, links = loaded("sd3_shift1.safetensors", "sd3.safetensors", 4096)
    links["latent"] = out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    links["model"], loader = out(graph.add("ModelSamplingSD3", model=links["model"], shift=5.0)), links["model"][0]
    if node == "PCMSample":
        return graph, sample(graph, links)
    ksampler(graph, links)
    return graph, loader
