"""What a graph shows through the nodes of well-known packs: a second few-step LoRA, before ours and after it, and words
of a negative prompt."""

from __future__ import annotations

from host.graphs import ksampler, loaded, sample
from host.packs import (
    EFFICIENCY,
    IMPACT,
    RGTHREE,
    WITH_TEXT,
    basic_pipe,
    efficient_loader,
    lora_stack,
    power,
    power_loader,
)
from host.server import Graph, Run, Server, out
from host.symptoms import TWICE
from host.test_guidance import UNUSED

LABEL = "Select the {} to add to the text"
KOHYA, STYLE = "kohya.safetensors", "style.safetensors"  # a few-step LoRA by its header, and a style's


def before(server: Server, graph: Graph, links: dict[str, list], models: list[list]) -> list[bool]:
    """For each model, whether our loader on it says that a few-step LoRA is there already."""
    ours = graph[links["model"][0]]["inputs"] | {"lora": "stochastic.safetensors"}
    loaders = [graph.add("PCMLoadLora", **ours | {"model": model}) for model in models]
    run, _ = server.latents(graph, *(sample(graph, links | {"model": out(node)}, steps=1) for node in loaders))
    return [warns(run, node) for node in loaders]


def after(server: Server, graph: Graph, links: dict[str, list], models: list[list]) -> list[bool]:
    """For each model that comes from our loader, whether Sample PCM says so."""
    nodes = [sample(graph, links | {"model": model}, steps=1) for model in models]
    run, _ = server.latents(graph, *nodes)
    return [warns(run, node) for node in nodes]


def warns(run: Run, node: str) -> bool:
    """Whether a node says once that the LoRA is there; prompts name it without its ending."""
    sentences = [TWICE.format(name) for name in (KOHYA, KOHYA.removesuffix(".safetensors"))]
    return sum(line in sentences for line in run.text(node).splitlines()) == 1


def test_rgthrees_power_loader(beside):
    entries = [power(), power(on=False), power(strength=0), power(STYLE)]
    for side in (before, after):
        graph, links = loaded("stochastic.safetensors")
        start = links["base" if side is before else "model"]
        models = [power_loader(graph, start, lora_1=power(STYLE), lora_2=entry) for entry in entries]
        assert side(beside(RGTHREE), graph, links, models) == [True, False, False, False], side.__name__


def test_rgthrees_lora_stack(beside):
    for side in (before, after):
        graph, links = loaded("stochastic.safetensors")
        start = links["base" if side is before else "model"]
        models = []
        for name, strength in ((KOHYA, 1.0), (KOHYA, 0.0), (STYLE, 1.0)):
            slots = {f"lora_0{i}": "None" for i in (1, 2, 3)} | {f"strength_0{i}": 1.0 for i in (1, 2, 3)}
            slots |= {"lora_04": name, "strength_04": strength, "clip": [links["base"][0], 1]}
            models.append(out(graph.add("Lora Loader Stack (rgthree)", model=start, **slots)))
        assert side(beside(RGTHREE), graph, links, models) == [True, False, False], side.__name__


def test_rgthrees_prompt_that_names_loras(beside):
    for side in (before, after):
        graph, links = loaded("stochastic.safetensors")
        start = links["base" if side is before else "model"]
        prompts = ("a fox <lora:kohya:0.8>", "a fox <lora:kohya>", "a fox <lora:kohya:0>", "a fox <lora:style:1>")
        node = "Power Prompt (rgthree)"
        nodes = [graph.add(node, prompt=prompt, opt_model=start, opt_clip=[links["base"][0], 1]) for prompt in prompts]
        assert side(beside(RGTHREE), graph, links, [out(node, 1) for node in nodes]) == [True, True, False, False]


def test_through_rgthrees_contexts_and_switches(beside):
    """The model is the second output of a context, and may come by another context."""
    graph, links = loaded("stochastic.safetensors")
    kohya, style = (power_loader(graph, links["base"], lora_1=power(name)) for name in (KOHYA, STYLE))
    models = []
    for first, second in ((kohya, style), (style, kohya)):
        one, two = (graph.add("Context (rgthree)", model=model) for model in (first, second))
        models += [out(one, 1), out(graph.add("Context (rgthree)", base_ctx=out(one), vae=links["vae"]), 1)]
        models.append(out(graph.add("Context Switch (rgthree)", ctx_01=out(one), ctx_02=out(two)), 1))
        models.append(out(graph.add("Any Switch (rgthree)", any_01=first, any_02=second)))
    assert before(beside(RGTHREE), graph, links, models) == [True] * 4 + [False] * 4


def test_efficient_loader(beside):
    graph, links = loaded()
    models = [efficient_loader(graph, KOHYA), efficient_loader(graph, KOHYA, 0.0), efficient_loader(graph, STYLE)]
    assert before(beside(EFFICIENCY), graph, links, models) == [True, False, False]


def test_the_lora_stacker(beside):
    """Every slot has strengths for both modes, of which one is read, and some of the 50 slots count."""
    graph, links = loaded()
    on = [
        lora_stack(graph, STYLE, KOHYA, mode="simple", model_str_2=0.0),
        lora_stack(graph, STYLE, KOHYA, mode="advanced", lora_wt_2=0.0),
        lora_stack(graph, STYLE, lora_stack=lora_stack(graph, KOHYA)),
    ]
    off = [
        lora_stack(graph, STYLE, KOHYA, mode="simple", lora_wt_2=0.0),
        lora_stack(graph, STYLE, KOHYA, mode="advanced", model_str_2=0.0),
        lora_stack(graph, STYLE, KOHYA, count=1),
    ]
    models = [efficient_loader(graph, lora_stack=stack) for stack in on + off]
    assert before(beside(EFFICIENCY), graph, links, models) == [True] * 3 + [False] * 3


def test_efficient_loaders_negative_prompt_is_read(beside):
    graph, links = loaded()
    nodes = []
    for words in ("blurry", ""):
        encoded = efficient_loader(graph, negative=words)[0]
        nodes.append(sample(graph, links | {"negative": out(encoded, 2)}, steps=1, cfg=1.0))
    run, _ = beside(EFFICIENCY).latents(graph, *nodes)
    assert [UNUSED in run.text(node).splitlines() for node in nodes] == [True, False]


def test_through_efficient_ksampler(beside):
    """It hands its model on, as the first of its outputs."""
    graph, links = loaded("stochastic.safetensors")
    models = []
    for name in (KOHYA, STYLE):
        core = graph.add("LoraLoaderModelOnly", model=links["model"], lora_name=name, strength_model=1.0)
        node = ksampler(graph, links | {"model": out(core)})
        graph[node]["class_type"] = "KSampler (Efficient)"
        graph[node]["inputs"] |= {"preview_method": "none", "vae_decode": "false"}
        models.append(out(node))
    assert after(beside(EFFICIENCY), graph, links, models) == [True, False]


def test_through_impacts_pipes(beside):
    for side in (before, after):
        graph, links = loaded("stochastic.safetensors")
        start, models = links["base" if side is before else "model"], []
        for name in (KOHYA, STYLE):
            core = graph.add("LoraLoaderModelOnly", model=start, lora_name=name, strength_model=1.0)
            pipe = basic_pipe(graph, links | {"model": out(core)})
            edited = out(graph.add("EditBasicPipe", basic_pipe=pipe, vae=links["vae"]))
            models += [out(graph.add("FromBasicPipe", basic_pipe=each)) for each in (pipe, edited)]
        assert side(beside(IMPACT), graph, links, models) == [True, True, False, False], side.__name__


def test_impacts_wildcards(beside):
    """A LoRA is in the text with wildcards and in what came of it: once is enough to say so."""
    graph, links = loaded("stochastic.safetensors")
    base = graph.add("CheckpointLoaderSimple", ckpt_name=WITH_TEXT)
    widgets = {"Select to add LoRA": LABEL.format("LoRA"), "Select to add Wildcard": LABEL.format("Wildcard")}
    models = []
    for text in ("a fox <lora:kohya:1.0>", "a fox <lora:style:1.0>"):
        texts = {"wildcard_text": text, "populated_text": text, "mode": False, "seed": 0}
        models.append(out(graph.add("ImpactWildcardEncode", model=out(base), clip=out(base, 1), **texts, **widgets)))
    assert before(beside(IMPACT), graph, links, models) == [True, False]
