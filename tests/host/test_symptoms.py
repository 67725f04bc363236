"""Each mistake that people make with few-step LoRAs, made in the host: what the nodes say, and when they are silent."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from host.graphs import core_sampler, custom, ksampler, loaded, pcm_sampler, sample, scheduler
from host.mistakes import LCM, TCD, Mistake, Shown, discrete
from host.server import Graph, Watched, out
from host.symptoms import MISTAKES, PAGE, page
from host.test_sampling import largest_difference
from host.tiny import RECIPE
from phased_consistency.samplers.recipe import HEADER_KEY

ROWS = [(f"{symptom}: {row.cause}", row) for symptom, rows in MISTAKES.items() for row in rows]
MADE = [pytest.param(row, 900 + i, id=name) for i, (name, row) in enumerate(ROWS) if isinstance(row, Mistake)]
SAMPLERS = ("PCMSample", "KSampler", "SamplerCustom", "SamplerCustomAdvanced")
STYLE = "lcm_lora_watercolor.safetensors"  # what it is, its name does not tell
LINE = 90  # characters that a node of ordinary size shows at once


@pytest.fixture(scope="module", autouse=True)
def files(server, models) -> None:
    """A file that has lost some of its alphas, a text encoder's with none, a style's, and two in a subfolder."""
    loras = models.folder / "loras"
    whole = load_file(loras / "kohya.safetensors")
    lost = [name for name in whole if name.endswith(".alpha")][:10]
    kept = {name: tensor for name, tensor in whole.items() if name not in lost}
    save_file(kept, loras / "half_alpha.safetensors", {HEADER_KEY: RECIPE.to_header()})
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    encoder = {f"{text}.lora_down.weight": torch.ones(8, 768), f"{text}.lora_up.weight": torch.ones(3072, 8)}
    save_file(whole | encoder, loras / "text_encoder.safetensors", {HEADER_KEY: RECIPE.to_header()})
    (loras / STYLE).write_bytes((loras / "style.safetensors").read_bytes())
    (loras / "sub").mkdir(exist_ok=True)
    for name in ("kohya.safetensors", LCM):
        (loras / "sub" / name).write_bytes((loras / name).read_bytes())


def watched(server, graph: Graph, seed: int) -> Watched:
    """What a browser is told of a graph that samples with a seed of its own, so that no sampler is cached."""
    for node in [node for node, entry in graph.items() if entry["class_type"] in SAMPLERS]:
        inputs = graph[node]["inputs"]
        inputs = graph[inputs["noise"][0]]["inputs"] if "noise" in inputs else inputs
        inputs["noise_seed" if "noise_seed" in inputs else "seed"] = seed
        graph.add("SaveLatent", samples=out(node), filename_prefix="test")
    return server.watch(graph)


@pytest.mark.parametrize(("mistake", "seed"), MADE)
def test_a_mistake_is_told_on_the_node(server, mistake, seed):
    if mistake.tooltip:
        kind, name = mistake.tooltip
        inputs = server.get(f"/object_info/{kind}")[kind]["input"]
        assert inputs["required"][name][1]["tooltip"].endswith(mistake.said)
        return
    graph, node = mistake.make()
    seen = watched(server, graph, seed)
    if seen.error:
        assert (seen.error["node_id"], seen.error["exception_message"].strip()) == (node, mistake.said)
    else:
        assert seen.texts[node].splitlines()[0] == mistake.said
        assert mistake.is_fact or seen.warnings[node][0] == mistake.said
        assert len(mistake.said) <= LINE
        if graph[node]["class_type"] == "PCMSample":
            assert not any(mistake.said in text for other, text in seen.texts.items() if other != node)


def test_each_of_two_equal_loaders_speaks_for_its_own_samplers(server):
    """The host would run one of them, and hand its model to the other's sampler, too."""
    graph, links = loaded()
    again = graph.add("PCMLoadLora", **graph[links["model"][0]]["inputs"])
    ksampler(graph, links, steps=4)
    ksampler(graph, links | {"model": out(again)}, steps=20)
    seen = watched(server, graph, 880)
    first, second = seen.texts[links["model"][0]], seen.texts[again]
    warning = "This LoRA was made for 4 steps, not 20: set steps to 4."
    assert warning not in first and second.splitlines()[0] == warning


def right_graphs() -> dict[str, tuple[Graph, str]]:
    """Other ways to sample a LoRA right, and their loaders."""
    graphs = {}

    def right(name: str, lora: str = "kohya.safetensors", **settings) -> tuple[Graph, dict[str, list]]:
        graph, links = loaded(lora, **settings)
        graphs[name] = (graph, links["model"][0])
        return graph, links

    for name in ("simple", "sgm_uniform"):
        ksampler(*right(f"KSampler with {name}"), scheduler=name)
    ksampler(*right("KSampler with ddim"), sampler_name="ddim")
    ksampler(*right("KSampler with half the steps at denoise 0.5"), steps=2, denoise=0.5)
    for sampler in ("lcm", "euler_ancestral"):
        ksampler(*right(f"an LCM file with {sampler}", LCM), sampler_name=sampler, steps=6)
    for name in ("simple", "sgm_uniform"):
        graph, links = right(f"an LCM file with {name} at denoise 0.5", LCM)
        links["latent"] = out(graph.add("TestLatent", seed=3, batch=1))
        ksampler(graph, links, sampler_name="lcm", scheduler=name, denoise=0.5)
    graph, links = right("an LCM file on LCM's timesteps", LCM)
    ksampler(graph, {**links, "model": discrete(graph, links["model"])}, sampler_name="lcm", scheduler="sgm_uniform")
    graph, links = right("5 of 8 steps of an LCM file", LCM)
    sigmas = graph.add("BasicScheduler", model=links["model"], scheduler="simple", steps=8, denoise=1.0)
    first = out(graph.add("SplitSigmas", sigmas=out(sigmas), step=5))
    custom(graph, links, core_sampler(graph, "lcm"), first)
    for sampler in ("lcm", "euler"):
        ksampler(*right(f"a TCD file with {sampler}", TCD), sampler_name=sampler)
    graph, links = right("a TCD file at a gamma of one's own", TCD)
    custom(graph, links, pcm_sampler(graph, "gamma", 0.5, recipe=links["recipe"]), out(scheduler(graph, links)))
    graph, links = right("euler_ancestral without noise")
    ancestral = graph.add("SamplerEulerAncestral", eta=0.0, s_noise=1.0)
    custom(graph, links, ancestral, out(scheduler(graph, links)))
    graph, links = right("back to noise")
    flipped = out(graph.add("FlipSigmas", sigmas=out(scheduler(graph, links))))
    custom(graph, links, core_sampler(graph, "euler"), flipped, add_noise=False)
    graph, links = right("a CFG that is tamed")
    tamed = out(graph.add("RescaleCFG", model=links["model"], multiplier=0.7))
    ksampler(graph, {**links, "model": tamed}, cfg=7.0)
    ksampler(*right("a text encoder's modules without alpha", "text_encoder.safetensors"))
    sizes = {"checkpoint": "sd3.safetensors", "text_width": 4096}
    for lora, name in (("sd3_shift1", "simple"), ("sd3", "sgm_uniform")):
        graph, links = right(f"the flow LoRA {lora} with {name}", f"{lora}.safetensors", **sizes)
        links["latent"] = out(graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
        ksampler(graph, links, scheduler=name)
    for change in ("keywords", "betas"):
        graph, links = right(f"another pack's {change}")
        other = graph.add("TestOtherPack", model=links["base"], how=change)
        graph[links["model"][0]]["inputs"]["model"] = out(other)
        ksampler(graph, links)
    graph, links = right("another pack's guider")
    inputs = {name: links[name] for name in ("model", "positive", "negative")}
    rest = {"guider": out(graph.add("TestGuider", **inputs)), "noise": out(graph.add("RandomNoise", noise_seed=7))}
    rest |= {"sampler": out(core_sampler(graph, "euler")), "sigmas": out(scheduler(graph, links))}
    graph.add("SamplerCustomAdvanced", **rest, latent_image=links["latent"])
    for name, settings in {"denoise 0.5": {"denoise": 0.5}, "the trained edges": {"edges": "trained"}}.items():
        graph, links = right(name, "pcm_sd15_smallcfg_8step_converted.safetensors")
        sigmas = out(scheduler(graph, links, **settings))
        custom(graph, links, pcm_sampler(graph, "from recipe", recipe=links["recipe"]), sigmas)
    graph, links = right("two halves")
    halves = graph.add("SplitSigmas", sigmas=out(scheduler(graph, links)), step=2)
    first = custom(graph, links, core_sampler(graph, "euler"), out(halves))
    custom(graph, {**links, "latent": out(first)}, core_sampler(graph, "euler"), out(halves, 1), add_noise=False)
    return graphs


@pytest.mark.parametrize("name", right_graphs())
def test_right_settings_are_not_complained_of(server, name):
    graph, loader = right_graphs()[name]
    seen = watched(server, graph, 800)
    assert seen.error is None
    assert seen.texts[loader].splitlines()[0].endswith((", deterministic.", ", stochastic.", ", gamma 0.3."))


def test_a_file_of_which_nothing_is_known_is_not_judged(server):
    """By widgets that nobody has set."""
    graph, links = loaded("unnamed.safetensors")
    ksampler(graph, links, steps=8, sampler_name="lcm", cfg=3.0)
    lines = watched(server, graph, 600).texts[links["model"][0]].splitlines()
    assert lines[0].startswith("Nothing is known of this file") and lines[1].startswith("4 steps, CFG 1")
    graph[links["model"][0]]["inputs"]["recipe"] = "widgets"
    assert watched(server, graph, 601).texts[links["model"][0]].startswith("This LoRA was made for 4 steps, not 8")


def test_what_another_pack_breaks_does_not_stop_the_run(server):
    """Here the sampler's function has no name."""
    graph, links = loaded()
    euler = graph.add("TestNameless")
    custom(graph, links, euler, out(scheduler(graph, links)))
    seen = watched(server, graph, 602)
    assert seen.error is None and seen.texts[links["model"][0]].startswith("4 steps, CFG 1")
    assert "A PCM node cannot tell whether this run suits its recipe." in server.log


def test_what_was_wrong_with_one_of_two_samplers_stays(server):
    """The second is right, and must not take back what was said of the first. A later run starts anew."""
    graph, links = loaded()
    wrong = ksampler(graph, links, scheduler="karras")
    ksampler(graph, {**links, "latent": out(wrong)}, steps=2, denoise=0.5)
    seen = watched(server, graph, 700)
    assert seen.texts[links["model"][0]].startswith("This LoRA never saw these sigmas")
    graph[wrong]["inputs"]["scheduler"] = "simple"
    assert server.watch(graph).texts[links["model"][0]].startswith("4 steps, CFG 1")


def test_watching_changes_nothing(server):
    """The same file by core's loader, which nothing watches, gives the same latent, wrong settings and right ones."""
    graph, links = loaded()
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="kohya.safetensors", strength_model=1.0)
    settings = ({}, {"scheduler": "karras", "sampler_name": "heun", "steps": 3, "cfg": 3.0})
    nodes = [ksampler(graph, {**links, "model": m}, **s) for s in settings for m in (links["model"], out(core))]
    a, b, c, d = server.latents(graph, *nodes)[1]
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)


def test_a_bypassed_lora_costs_nothing(server):
    """No patch, no watcher, and KSampler draws what it draws from the checkpoint."""
    graph, links = loaded(strength=0.0)
    nodes = [
        ksampler(graph, {**links, "model": m}, steps=2, scheduler="karras") for m in (links["model"], links["base"])
    ]
    run, latents = server.latents(graph, *nodes)
    assert torch.equal(*latents)
    assert run.text(links["model"][0]).splitlines()[:2] == [
        "Strength 0: the LoRA is off, and the model is as it came.",
        "4 steps, CFG 1 (1 to 2), deterministic.",
    ]


def test_a_style_stacks_in_either_order(server):
    graph, links = loaded()
    settings = {"lora_name": "style.safetensors", "strength_model": 0.7}
    after = graph.add("LoraLoaderModelOnly", model=links["model"], **settings)
    before = graph.add("LoraLoaderModelOnly", model=links["base"], **settings)
    loader = graph.add("PCMLoadLora", **graph[links["model"][0]]["inputs"] | {"model": out(before)})
    ends = [{**links, "model": out(after)}, {**links, "model": out(loader), "recipe": out(loader, 1)}]
    nodes = [sample(graph, end) for end in ends]
    run, latents = server.latents(graph, *nodes)
    assert largest_difference(*latents) < 1e-3
    assert [run.text(node) for node in nodes] == ["4 steps at CFG 1, deterministic."] * 2
    assert run.text(loader) == run.text(links["model"][0])


def test_negative_words_are_found_where_the_graph_has_them(server):
    graph, links = loaded()
    words = links["negative"]
    graph[words[0]]["inputs"]["text"] = "blurry"
    net = out(graph.add("ControlNetLoader", control_net_name="tiny.safetensors"))
    image = out(graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0))
    settings = {"control_net": net, "image": image, "strength": 0.0, "start_percent": 0.0, "end_percent": 1.0}
    ends = {
        "plain": (links["positive"], words),
        "through a ControlNet": (links["positive"], words),
        "on the other side": (words, links["positive"]),
        "of one prompt for both": (words, words),
        "zeroed": (links["positive"], out(graph.add("ConditioningZeroOut", conditioning=words))),
    }
    nodes = {}
    for name, (positive, negative) in ends.items():
        if name in ("through a ControlNet", "on the other side"):
            applied = graph.add("ControlNetApplyAdvanced", positive=positive, negative=negative, **settings)
            positive, negative = out(applied), out(applied, 1)
        nodes[name] = sample(graph, {**links, "positive": positive, "negative": negative}, steps=1)
    run, _ = server.latents(graph, *nodes.values())
    warned = [name for name, node in nodes.items() if "does not use the negative prompt" in run.text(node)]
    assert warned == ["plain", "through a ControlNet"]


def test_a_model_that_may_have_the_lora_is_not_complained_of(server):
    """Merged, where the graph does not tell; or put on by core's loader alone, or by another pack's node."""
    graph, links = loaded()
    merged = graph.add("ModelMergeSimple", model1=links["base"], model2=links["model"], ratio=0.5)
    core = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name="kohya.safetensors", strength_model=1.0)
    perhaps = graph.add("LoraLoaderModelOnly", model=links["base"], lora_name=STYLE, strength_model=1.0)
    other = graph.add("TestOtherPack", model=links["base"], how="lora")
    nodes = [sample(graph, {**links, "model": out(model)}) for model in (merged, core, perhaps, other)]
    run, _ = server.latents(graph, *nodes)
    assert [run.text(node) for node in nodes] == ["4 steps at CFG 1, deterministic."] * 4


def test_a_style_named_after_a_method_is_no_second_lora(server):
    graph, links = loaded()
    style = {"lora_name": STYLE, "strength_model": 1.0}
    before = graph.add("LoraLoaderModelOnly", model=links["base"], **style)
    graph[links["model"][0]]["inputs"]["model"] = out(before)
    after = graph.add("LoraLoaderModelOnly", model=links["model"], **style)
    node = sample(graph, {**links, "model": out(after)}, steps=1)
    run, _ = server.latents(graph, node)
    assert "loaded too" not in run.text(node) + run.text(links["model"][0])


@pytest.mark.parametrize("lora", ["kohya.safetensors", LCM])
def test_a_lora_in_a_subfolder(server, lora):
    texts = []
    for name in (lora, f"sub/{lora}"):
        graph, links = loaded(name)
        run, _ = server.latents(graph, sample(graph, links, steps=1))
        texts.append(run.text(links["model"][0]))
    assert texts[0] == texts[1]


def test_every_test_that_is_named_is_there():
    for _, row in ROWS:
        if isinstance(row, Shown):
            file, name = row.test.split("::")
            assert f"def {name}(" in (PAGE.parents[1] / "tests" / "host" / file).read_text(encoding="utf-8")


def test_the_page_is_the_table():
    """Run `python -m host.symptoms` in tests/ after a change."""
    assert PAGE.read_text(encoding="utf-8") == page()
