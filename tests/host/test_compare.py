"""PCM Compare and PCM CFG schedule: the pictures are Sample PCM's, and the evaluations are what the model says."""

from __future__ import annotations

import math
import uuid
from itertools import groupby
from typing import Any

import pytest
import torch

from host.graphs import core_sampler, custom, loaded, pcm_sampler, sample, scheduler
from host.server import Graph, Server, out
from host.test_editing import failed
from host.test_flow import sd3
from phased_consistency.samplers.recipe import Recipe

MODES = (
    "Write from recipe, deterministic, stochastic, or gamma and a number from 0 to 1, such as: deterministic, "
    "stochastic, gamma 0.3."
)
MADE_FOR = "This LoRA was made for 4 steps, not 2: set steps to 4."


def compare(graph: Graph, links: dict[str, list], **settings: Any) -> str:
    """Add PCM Compare; returns its id."""
    inputs = {k: links[k] for k in ("model", "recipe", "vae", "positive", "negative")}
    widgets = {"seed": 7, "step_counts": "2", "modes": "from recipe", "cfg": 0.0, "denoise": 1.0}
    return graph.add("PCMCompare", **inputs, **{"latent_image": links["latent"]} | widgets | settings)


def schedule(graph: Graph, links: dict[str, list], **settings: Any) -> str:
    """Add PCM CFG schedule, of the first step; returns its id."""
    widgets = {"cfg": 2.0, "steps": 0, "from_step": 1, "to_step": 1} | settings
    return graph.add("PCMCFGSchedule", model=links["model"], recipe=links["recipe"], **widgets)


class Count:
    """How a node's model is evaluated: + for the positive prompt, - for the negative one, step by step."""

    def __init__(self, graph: Graph, model: list, stop_at: int = 0):
        self.name = uuid.uuid4().hex
        self.model = out(graph.add("TestCount", model=model, name=self.name, stop_at=stop_at))

    def of(self, server: Server) -> list[str]:
        """For each level in turn its evaluations, also where the host does not batch them."""
        lines = [line.split() for line in server.log.splitlines() if f"TestCount {self.name}" in line]
        levels = groupby(lines, key=lambda words: words[-2])
        return ["".join(sorted("".join(words[-1] for words in same))) for _, same in levels]


@pytest.fixture(scope="module")
def compared(server):
    """Two pictures at 4 and at 2 steps, deterministic and with some noise, with CFG; and the same by other nodes."""
    graph, links = loaded()
    links["latent"] = out(graph.add("EmptyLatentImage", width=64, height=64, batch_size=2))
    count = Count(graph, links["model"])
    settings = {"step_counts": "4, 2", "modes": "from recipe, gamma 0.3", "cfg": 1.5}
    node = compare(graph, {**links, "model": count.model}, **settings)
    singles = [sample(graph, links, steps=steps, cfg=1.5) for steps in (4, 2)]
    some = pcm_sampler(graph, "gamma", recipe=links["recipe"])
    singles += [custom(graph, links, some, out(scheduler(graph, links, steps=steps)), cfg=1.5) for steps in (4, 2)]
    images = [out(graph.add("VAEDecode", samples=out(single), vae=links["vae"])) for single in singles]
    run, (grid, batch, *pictures) = server.tensors(graph, out(node), out(node, 1), *images)
    return grid[0], batch, pictures, run.text(node).splitlines(), count.of(server)


def test_each_cell_is_what_sample_pcm_makes(compared):
    _, batch, pictures, _, _ = compared
    assert torch.equal(batch, torch.cat(pictures))
    assert all((batch[i] - batch[j]).abs().max() > 0.01 for i in range(8) for j in range(i))


def test_the_evaluations_are_counted(compared):
    *_, lines, counted = compared
    assert counted == ["+-"] * (4 + 2 + 4 + 2)
    assert lines == [
        "4 steps, deterministic, CFG 1.5: 8 evaluations.",
        "2 steps, deterministic, CFG 1.5: 4 evaluations.",
        "4 steps, stochastic, gamma 0.3, CFG 1.5: 8 evaluations.",
        "2 steps, stochastic, gamma 0.3, CFG 1.5: 4 evaluations.",
    ]


def written(text: str, size: int) -> torch.Tensor:
    """(h, w) a text as Pillow writes it in white, without margins."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    page = Image.new("L", (math.ceil(font.getlength(text)) + 2, 2 * size))
    ImageDraw.Draw(page).text((1, 0), text, fill=255, font=font)
    page = page.crop(page.getbbox())
    return torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(page.height, page.width) / 255


def places(page: torch.Tensor, ink: torch.Tensor) -> list[tuple[int, int]]:
    """The rows and columns of `page` (H, W), 0 where empty and 1 where white, at which this ink is found."""
    windows, line = page.unfold(0, ink.shape[0], 1).unfold(1, ink.shape[1], 1), ink.shape[0] // 2
    of_line = (windows[:, :, line] - ink[line]).abs().amax(2).lt(0.02).nonzero().tolist()  # the others need no look
    return [(y, x) for y, x in of_line if (windows[y, x] - ink).abs().max() < 0.02]


def corners_of(grid: torch.Tensor, picture: torch.Tensor) -> list[tuple[int, int]]:
    """The rows and columns at which a picture (h, w, C) stands in a grid (H, W, C), bit for bit."""
    height, width = picture.shape[:2]
    corners = (grid == picture[0, 0]).all(-1).nonzero().tolist()
    return [(y, x) for y, x in corners if torch.equal(grid[y : y + height, x : x + width], picture)]


def test_the_grid_has_every_picture_in_its_place_with_its_label(compared):
    grid, batch, *_ = compared
    size, gap = 14, 7
    corners = [place for each in batch for place in corners_of(grid, each)]
    tops, lefts = (sorted({corner[axis] for corner in corners}) for axis in (0, 1))
    assert corners == [(top, left) for top in tops for left in lefts], "a row for each mode, a batch side by side"
    assert (len(tops), len(lefts)) == (2, 4) and lefts[1] - lefts[0] == lefts[3] - lefts[2] == 64 + gap
    page = (grid[..., 0] - 0.1) / 0.9
    cells = {
        "4 steps": [(-1, 0)],
        "2 steps": [(-1, 1)],
        "deterministic": [(0, -1)],
        "stochastic": [(1, -1)],
        "gamma 0.3": [(1, -1)],
        "CFG 1.5": [(0, -1), (1, -1)],
        "8 evaluations": [(0, 0), (1, 0)],
        "4 evaluations": [(0, 1), (1, 1)],
        "3 steps": [],
    }
    for text, wanted in cells.items():
        corners = places(page, written(text, size))
        in_cells = [(sum(y >= top for top in tops) - 1, sum(x >= left for left in lefts[::2]) - 1) for y, x in corners]
        assert in_cells == wanted, text


def test_a_large_picture_has_large_letters_and_image_to_image_says_its_steps(server):
    graph, links = loaded("stochastic.safetensors")
    links["latent"] = out(graph.add("EmptyLatentImage", width=64, height=640, batch_size=1))
    node = compare(graph, links, step_counts="2", modes="from recipe", denoise=0.5)
    run, (grid,) = server.tensors(graph, out(node))
    assert run.text(node).splitlines()[-1] == "2 steps, stochastic, CFG 1: 2 evaluations."
    page = (grid[0, ..., 0] - 0.1) / 0.9
    assert len(places(page, written("2 evaluations", 32))) == 1


def test_one_bad_entry_is_named_and_the_others_are_drawn(server):
    graph, links = loaded()
    node = compare(graph, links, step_counts="4, four, 99, 4", modes="fast, deterministic, from recipe")
    run, (batch,) = server.tensors(graph, out(node, 1))
    assert len(batch) == 1
    assert run.warnings(node) == [
        "step_counts is '4, four, 99, 4', of which 'four' is no number of steps. Write whole numbers, such as 1, 2, "
        "4, 8.",
        f"modes is 'fast, deterministic, from recipe', of which 'fast' is none. {MODES}",
        "modes is 'fast, deterministic, from recipe', of which some are the same for this LoRA: each is drawn once.",
        "99 of step_counts is left out: steps must be between 1 and 40, the number of solver points; got 99.",
    ]
    assert run.text(node).splitlines()[-1] == "4 steps, deterministic, CFG 1: 4 evaluations."


WRONG = {
    ("step_counts", "2.5"): "step_counts is '2.5', of which '2.5' is no number of steps.",
    ("step_counts", " "): "step_counts is ' ', in which there is no number. Write whole numbers, such as 1, 2, 4, 8.",
    (
        "step_counts",
        "99",
    ): "99 of step_counts is left out: steps must be between 1 and 40, the number of solver points; got 99.",
    ("modes", "fast"): "modes is 'fast', of which 'fast' is none. Write from recipe, deterministic, stochastic, or",
    ("modes", "gamma 1.5"): "modes is 'gamma 1.5', of which 'gamma 1.5' is none.",
    ("modes", ","): "modes is ',', in which there is none.",
}


@pytest.mark.parametrize("widget, text", WRONG)
def test_text_that_cannot_be_read_is_told(server, widget, text):
    graph, links = loaded()
    message = failed(server, graph, out(compare(graph, links, **{widget: text})))
    assert message.startswith(WRONG[widget, text])


def test_a_browser_sees_progress_over_all_runs_and_an_interrupt_leaves_no_trace(server):
    graph, links = loaded()
    stopped = Count(graph, links["model"], stop_at=2)
    grid = out(compare(graph, {**links, "model": stopped.model}, step_counts="1, 2"))
    graph.add("TestTensor", value=grid, name="none")
    prompt = server.queue(graph)
    server.wait(prompt)
    messages = [kind for kind, _ in server.get(f"/history/{prompt}")[prompt]["status"]["messages"]]
    assert "execution_interrupted" in messages
    assert stopped.of(server) == ["++"], "in the second run, which starts at the level of the first"

    graph, links = loaded()
    node = compare(graph, links, step_counts="0, 1;2", seed=103)
    graph.add("TestTensor", value=out(node), name="none")
    seen = server.watch(graph)
    assert seen.progress[node] == (7, 7) and seen.previews == 7
    assert seen.texts[node].splitlines()[-1] == "2 steps, deterministic, CFG 1: 2 evaluations."


def test_both_on_a_flow_model(server):
    graph, links = sd3()
    count = Count(graph, out(schedule(graph, links, to_step=2)))
    links["model"] = count.model
    node, single = compare(graph, links, step_counts="0"), sample(graph, links)
    picture = out(graph.add("VAEDecode", samples=out(single), vae=links["vae"]))
    run, (image, alone) = server.tensors(graph, out(node, 1), picture)
    assert torch.equal(image, alone)
    assert count.of(server) == ["+-", "+-", "+", "+"] * 2
    assert run.text(node).splitlines()[-1].endswith("CFG 2 on steps 1 to 2 of 4, else 1: 6 evaluations.")


@pytest.fixture(scope="module")
def guided(server):
    """4 steps with CFG 2 on the first, by several samplers; and by core's alone, with the sigmas split in two."""
    graph, links = loaded()
    node = schedule(graph, links)
    counts = {name: Count(graph, out(node)) for name in ("ours", "parts", "sgm_uniform", "heun", "image")}
    counted_links = {name: {**links, "model": count.model} for name, count in counts.items()}
    counts["all"] = Count(graph, out(schedule(graph, {**links, "model": out(node)}, to_step=0)))
    counted_links["all"] = {**links, "model": counts["all"].model}
    sigmas, euler = out(scheduler(graph, links)), core_sampler(graph, "euler")
    sgm = graph.add("BasicScheduler", model=links["model"], scheduler="sgm_uniform", steps=4, denoise=1.0)
    encoded = {**counted_links["image"], "latent": out(graph.add("TestLatent", seed=3, batch=1))}
    halves = graph.add("SplitSigmas", sigmas=sigmas, step=1)
    first = custom(graph, links, euler, out(halves), cfg=2.0)
    later = {**links, "latent": out(first)}
    nodes = {
        "ours": sample(graph, counted_links["ours"]),
        "parts": custom(graph, counted_links["parts"], euler, sigmas, cfg=5.0),
        "sgm_uniform": custom(graph, counted_links["sgm_uniform"], euler, out(sgm), cfg=5.0),
        "heun": custom(graph, counted_links["heun"], core_sampler(graph, "heun"), sigmas),
        "image": sample(graph, encoded, denoise=0.75),
        "all": sample(graph, counted_links["all"], cfg=1.0),
        "unscheduled": sample(graph, links, cfg=2.0),
        "split": custom(graph, later, euler, out(halves, 1), cfg=1.0, add_noise=False),
    }
    compared = compare(graph, counted_links["ours"], step_counts="4, 2, 8")
    graph.add("TestTensor", value=out(compared), name="none")
    run, latents = server.latents(graph, *nodes.values())
    texts = {"node": run.text(node), "compared": run.text(compared)}
    texts |= {name: run.text(nodes[name]) for name in ("ours", "image", "all")}
    counted = {name: count.of(server) for name, count in counts.items()}
    return dict(zip(nodes, latents, strict=True)), texts, counted


def test_a_schedule_skips_the_negative_prompt_on_the_other_steps(guided):
    counted = guided[2]
    assert counted["parts"] == counted["sgm_uniform"] == ["+-", "+", "+", "+"]
    assert counted["all"] == ["+-"] * 4
    assert counted["heun"] == ["+-", "++", "++", "++"], "each level twice, but for the first"
    assert counted["image"] == ["+", "+", "+"], "it starts in the second step"


def test_a_schedule_is_core_sampling_with_the_sigmas_split(guided):
    latents = guided[0]
    scale = latents["split"].abs().max()
    assert (latents["ours"] - latents["split"]).abs().max() < 1e-4 * scale
    assert (latents["parts"] - latents["split"]).abs().max() < 1e-4 * scale
    assert torch.equal(latents["all"], latents["unscheduled"])
    assert (latents["ours"] - latents["all"]).abs().max() > 0.1


@pytest.mark.parametrize(("steps", "counted"), [((4, 4), "+ + + +-"), ((1, 3), "+- +- +- +")])
def test_a_schedule_finds_its_steps_in_levels_that_a_shift_has_moved(server, steps, counted):
    """The host's sgm_uniform has the ticks 1000, 751, 502 and 252 at shift 3."""
    graph, links = sd3()
    count = Count(graph, out(schedule(graph, links, from_step=steps[0], to_step=steps[1])))
    sgm = graph.add("BasicScheduler", model=links["model"], scheduler="sgm_uniform", steps=4, denoise=1.0)
    node = custom(graph, {**links, "model": count.model}, core_sampler(graph, "euler"), out(sgm))
    server.latents(graph, node)
    assert count.of(server) == counted.split()


def test_cores_override_has_the_last_word_where_it_comes_after(server):
    """But where one comes before, too: the host then runs both of them first."""
    if "CFGOverride" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no CFGOverride")
    graph, links = loaded()

    def override(model: list, cfg: float, start: float) -> list:
        return out(graph.add("CFGOverride", model=model, cfg=cfg, start_percent=start, end_percent=1.0))

    scheduled = out(schedule(graph, links))
    after_another = out(schedule(graph, {**links, "model": override(links["model"], 2.0, 0.0)}))
    models = [override(scheduled, 2.0, 0.6), override(scheduled, 1.0, 0.0), override(after_another, 2.0, 0.6)]
    counts = [Count(graph, model) for model in models]
    server.latents(graph, *(sample(graph, {**links, "model": count.model}) for count in counts))
    late, never, before_too = (count.of(server) for count in counts)
    assert late == ["+-", "+", "+", "+-"]
    assert never == ["+", "+", "+", "+"]
    assert before_too == ["+-", "+", "+", "+"]


def test_a_schedule_says_what_it_costs_and_the_samplers_what_they_follow(guided):
    texts = guided[1]
    text = "CFG 2 on step 1 of 4, else 1"
    assert texts["node"] == f"{text}: 5 evaluations; with CFG on all 8, with none 4."
    assert texts["ours"] == f"4 steps at {text}, deterministic."
    assert texts["all"] == "4 steps at CFG 2 on steps 1 to 4 of 4, deterministic."
    assert texts["image"].splitlines()[-1] == f"3 steps at {text}, deterministic."
    assert texts["compared"].splitlines()[-3:] == [
        f"4 steps, deterministic, {text}: 5 evaluations.",
        f"2 steps, deterministic, {text}: 3 evaluations.",
        f"8 steps, deterministic, {text}: 10 evaluations.",
    ]


def test_a_cfg_that_does_not_fit_is_told(server):
    graph, links = loaded()
    odd = [schedule(graph, links, cfg=cfg, steps=steps) for cfg, steps in ((7.0, 0), (0.0, 2))]
    graph_of_hyper, hyper = loaded("Hyper-SD15-8steps-CFG-lora.safetensors")
    part = schedule(graph_of_hyper, hyper, cfg=0.0, from_step=7, to_step=0)
    sampled = [sample(graph, {**links, "model": out(node)}, steps=1) for node in odd]
    run, _ = server.latents(graph, *sampled)
    recipe = Recipe(family="sd15", phases=4)
    assert run.text(odd[0]).splitlines()[0] == recipe.warnings(4, 7.0)[0]
    assert run.text(sampled[0]).splitlines()[1] == recipe.warnings(4, 7.0)[0]
    assert run.text(odd[1]).splitlines() == [
        "CFG 1 guides nothing: set cfg above 1.",
        MADE_FOR,
        "CFG 1 on step 1 of 2, else 1: 2 evaluations; with CFG on all 4, with none 2.",
    ]
    run, _ = server.latents(graph_of_hyper, sample(graph_of_hyper, {**hyper, "model": out(part)}, steps=1))
    assert run.text(part).splitlines() == [
        "The other steps are at CFG 1, below the LoRA's 5.",
        "CFG 5 on steps 7 to 8 of 8, else 1: 10 evaluations; with CFG on all 16, with none 8.",
    ]


def test_steps_that_there_are_not_are_refused_and_so_is_a_guider_without_a_negative_prompt(server):
    graph, links = loaded()
    wrong = out(sample(graph, {**links, "model": out(schedule(graph, links, from_step=3, to_step=2))}))
    assert failed(server, graph, wrong).startswith("from_step is 3 and to_step 2, of 4 steps: the first may be 1 to 4")

    graph, links = loaded()
    guider = graph.add("BasicGuider", model=out(schedule(graph, links)), conditioning=links["positive"])
    noise, euler = out(graph.add("RandomNoise", noise_seed=7)), out(core_sampler(graph, "euler"))
    rest = {"sampler": euler, "sigmas": out(scheduler(graph, links)), "latent_image": links["latent"]}
    alone = graph.add("SamplerCustomAdvanced", noise=noise, guider=out(guider), **rest)
    message = failed(server, graph, out(alone))
    assert message.rstrip() == (
        "PCM CFG schedule asks for CFG 2 on step 1 of 4, else 1, but Guider_Basic has no negative prompt: "
        "use CFGGuider, or take PCM CFG schedule out."
    )
