"""The graphs that several host tests begin with."""

from __future__ import annotations

from typing import Any

from host.server import Graph, out


def loaded(
    lora: str = "kohya.safetensors",
    checkpoint: str = "tiny.safetensors",
    text_width: int = 768,
    pooled_width: int = 2048,
    **widgets: Any,
) -> tuple[Graph, dict[str, list]]:
    """A graph with the checkpoint and a LoRA loaded, and its links by name: model, recipe, positive, negative, vae."""
    graph, widths = Graph(), {"width": text_width, "pooled": pooled_width}
    base = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    settings = {"strength": 1.0, "recipe": "auto", "phases": 4, "mode": "deterministic", "cfg": 1.0} | widgets
    loader = graph.add("PCMLoadLora", model=out(base), lora=lora, **settings)
    links = {
        "base": out(base),
        "vae": out(base, 2),
        "model": out(loader),
        "recipe": out(loader, 1),
        "positive": out(graph.add("TestConditioning", seed=1, **widths)),
        "negative": out(graph.add("TestConditioning", seed=2, **widths)),
        "latent": out(graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)),
    }
    return graph, links


def sample(graph: Graph, links: dict[str, list], **settings: Any) -> str:
    """Add Sample PCM; returns its id."""
    inputs = {k: links[k] for k in ("model", "recipe", "positive", "negative")} | {"latent_image": links["latent"]}
    return graph.add("PCMSample", **inputs | {"seed": 7, "steps": 0, "cfg": 0.0, "denoise": 1.0} | settings)


def scheduler(graph: Graph, links: dict[str, list], **settings: Any) -> str:
    """Add PCM Scheduler; returns its id."""
    return graph.add(
        "PCMScheduler", recipe=links["recipe"], **{"steps": 0, "denoise": 1.0, "edges": "authors'"} | settings
    )


def custom(graph: Graph, links: dict[str, list], sampler: str, sigmas: list, **settings: Any) -> str:
    """Add core's SamplerCustom with a sampler node; returns its id."""
    inputs = {k: links[k] for k in ("model", "positive", "negative")} | {"latent_image": links["latent"]}
    inputs |= {"sampler": out(sampler), "sigmas": sigmas}
    return graph.add("SamplerCustom", **inputs | {"add_noise": True, "noise_seed": 7, "cfg": 1.0} | settings)


def ksampler(graph: Graph, links: dict[str, list], **settings: Any) -> str:
    """Add core's KSampler as a 4-step LoRA wants it; returns its id."""
    inputs = {k: links[k] for k in ("model", "positive", "negative")} | {"latent_image": links["latent"]}
    right = {"seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return graph.add("KSampler", **inputs | right | settings)


def core_sampler(graph: Graph, name: str) -> str:
    return graph.add("KSamplerSelect", sampler_name=name)


def pcm_sampler(graph: Graph, mode: str, gamma: float = 0.3, **inputs: Any) -> str:
    return graph.add("PCMSampler", mode=mode, gamma=gamma, **inputs)


def picture(graph: Graph, width: int = 70, height: int = 50, mask: str = "middle", **settings: Any) -> dict[str, list]:
    """Add a random picture; returns its links: image, mask."""
    node = graph.add(
        "TestPicture", width=width, height=height, mask=mask, **{"channels": 3, "batch": 1, "seed": 5} | settings
    )
    return {"image": out(node), "mask": out(node, 1)}


WIDGETS = {  # an edit's own, where a test does not say otherwise
    "Inpaint": {"grow": 8, "denoise": 1.0},
    "Outpaint": {"left": 8, "top": 0, "right": 16, "bottom": 0, "grow": 8, "denoise": 1.0},
    "Colorize": {"denoise": 1.0},
    "SuperResolution": {"factor": 2, "denoise": 0.5},
    "Stroke": {"strength": 0.5},
    "Denoise": {"noise": 0.0},
    "Interpolate": {"frames": 3, "denoise": 1.0, "seed_b": 9},
}
SAMPLING, LOOP = ("seed", "steps", "cfg", "denoise"), ("every", "form", "projection")


def edit(graph: Graph, links: dict[str, list], kind: str, **settings: Any) -> str:
    """Add an artist's editing node, of 2 steps; returns its id. settings: its sockets, and widgets that differ."""
    shared = {k: links[k] for k in ("model", "recipe", "vae", "positive", "negative")}
    return graph.add(f"PCM{kind}", **shared | {"seed": 7, "steps": 2, "cfg": 0.0} | WIDGETS[kind] | settings)


def composed(graph: Graph, links: dict[str, list], kind: str, **settings: Any) -> dict[str, list]:
    """Add the composable form of the same; returns its links: operator, image, latent, encoded."""
    widgets = {k: v for k, v in (WIDGETS[kind] | settings).items() if k not in (*SAMPLING, *LOOP)}
    loop = {k: v for k, v in settings.items() if k in LOOP}
    operator = graph.add(f"PCM{kind}Operator", **widgets)
    encoded = out(graph.add("VAEEncode", pixels=out(operator, 1), vae=links["vae"]))
    inputs = {"operator": out(operator), "vae": links["vae"], "recipe": links["recipe"]}
    keeping = graph.add("PCMEditSampler", **inputs, mode="from recipe", gamma=0.3, **loop)
    levels = scheduler(graph, links, steps=settings.get("steps", 2), denoise=WIDGETS[kind]["denoise"])
    sampled = custom(graph, {**links, "latent": encoded}, keeping, out(levels))
    decoded = graph.add("PCMEditDecode", operator=out(operator), vae=links["vae"], samples=out(sampled))
    return {"operator": out(operator), "image": out(decoded), "latent": out(sampled), "encoded": encoded}
