"""The blocks of a network: computed again, offloaded, compiled; none of it changes what a step computes."""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from phased_consistency.trainer.efficiency import blocks
from phased_consistency.trainer.efficiency.blocks import (
    LEAVING,
    InputOffload,
    Offload,
    blocks_of,
    check_compiler,
    compile_blocks,
    recompute,
)
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.lora.adapter import Adapter, Whole
from support.runs import speck

TICKS = torch.tensor([400, 900])


def adapted(family="sd15"):
    base = load_base(speck(family).name)
    adapter = Adapter(base.network, base.lora_targets, rank=2, alpha=1.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return base, adapter


def inputs(base, side=32):
    shape, condition = base.latent_shape(side), base.encode_prompts(["a red star", "a blue ring"])
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), TICKS, condition


def step(base, adapter):
    """Teacher, student and discriminator's body as a step runs them; outputs and the adapter's gradients."""
    x, tick, condition = inputs(base)
    for parameter in adapter.parameters():
        parameter.grad = None
    with torch.no_grad(), adapter.off():
        teacher = base.denoise(x, tick, condition)
    student = base.denoise(x, tick, condition)
    with adapter.off():
        features = base.features(student, tick, condition)
    ((student - teacher).square().mean() + sum(f.square().mean() for f in features)).backward()
    return [teacher, student.detach(), *(p.grad.clone() for p in adapter.parameters())]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_nothing_changes_to_the_bit(family):
    base, adapter = adapted(family)
    plain = step(base, adapter)
    offload = Offload(base.network, base.device)
    recompute(adapter)
    assert all(a.equal(b) for a, b in zip(plain, step(base, adapter), strict=True))
    assert offload.copies > 0


def gradients_go_to(network):
    """Hooks on all blocks; the list to which they add the tensors that each is given and that gradients go to."""
    given = []

    def note(block, args, kwargs):
        if torch.is_grad_enabled():
            given.append([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks_of(network).values()]
    return given, handles


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_inputs_that_wait_in_main_memory_change_no_bit(family):
    """And nothing else holds them: between the passes they are gone from where they were."""
    base, adapter = adapted(family)
    plain = step(base, adapter)
    inputs_away = InputOffload(base.device)
    recompute(adapter, inputs=inputs_away)
    assert all(a.equal(b) for a, b in zip(plain, step(base, adapter), strict=True))

    given, handles = gradients_go_to(base.network)
    inputs_away.moved = 0
    output = base.denoise(*inputs(base))
    assert inputs_away.moved == sum(x.nbytes for some in given for x in some) > 0
    held = [weakref.ref(x.untyped_storage()) for some in given[1:] for x in some]
    for handle in handles:
        handle.remove()
    given.clear()
    assert sum(storage() is not None for storage in held) <= 1, "the last one, of which the output is made"
    output.sum().backward()


class Log:
    """Stands for a GPU's stream: notes what it is asked to do, and what it is asked to wait for."""

    def __init__(self, name, lines):
        self.name, self.lines, self.events = name, lines, 0

    def record_event(self):
        self.events += 1
        name = f"{self.name} {self.events}"
        return SimpleNamespace(name=name, synchronize=lambda: self.lines.append(f"host waits for {name}"))

    def wait_event(self, event):
        self.lines.append(f"{self.name} waits for {event.name}")


def test_inputs_leave_after_they_are_made_and_come_back_after_they_have_left(monkeypatch):
    lines = []
    work, away = Log("work", lines), Log("away", lines)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: work)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: lines.append(f"kept for {stream.name}"))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, pin_memory, **kwargs: empty_like(*args, **kwargs))
    offload = InputOffload(torch.device("cpu"))
    offload.stream = away

    tensors = [torch.randn(3, requires_grad=True) for _ in range(LEAVING + 1)]
    shared = torch.randn(3)
    with offload.of([*tensors, shared, "no tensor", None]):
        results = [x.square() * shared for x in tensors]
    leaving = [[f"away waits for work {i}", "kept for away"] for i in range(1, LEAVING + 2)]
    assert lines == [*sum(leaving[:-1], []), "host waits for away 1", *leaving[-1]]
    assert offload.moved == sum(x.nbytes for x in tensors), "and not what no gradient goes to"

    lines.clear()
    torch.stack(results).sum().backward()
    assert all(x.grad.allclose(2 * x * shared) for x in tensors)
    assert sorted(lines) == [f"work waits for away {i}" for i in range(1, LEAVING + 2)]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_some_blocks_computed_again_change_no_bit(family):
    base, adapter = adapted(family)
    plain = step(base, adapter)
    recompute(adapter, list(blocks_of(base.network))[::2])
    assert all(a.equal(b) for a, b in zip(plain, step(base, adapter), strict=True))


def kept(base, adapter):
    """Bytes that autograd keeps for a student's pass, besides weights."""
    parameters = {p.untyped_storage().data_ptr() for p in base.network.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = base.denoise(*inputs(base))
    del output
    return sum(seen.values())


def test_blocks_that_are_computed_again_keep_nothing():
    base, adapter = adapted()
    before = kept(base, adapter)
    recompute(adapter)
    assert kept(base, adapter) < 0.35 * before


def test_a_block_runs_twice_with_gradients_and_once_without():
    base, adapter = adapted()
    path, block = next(iter(blocks_of(base.network).items()))
    calls, run = [], block.forward
    block.forward = lambda *args, **kwargs: calls.append(torch.is_grad_enabled()) or run(*args, **kwargs)
    recompute(adapter, [path])
    with torch.no_grad():
        base.denoise(*inputs(base))
    assert calls == [False]
    base.denoise(*inputs(base)).sum().backward()
    assert calls == [False, True, True]


def test_offloaded_weights_come_in_one_piece_a_pass_and_leave_with_it():
    base, adapter = adapted()
    frozen = [p for b in blocks_of(base.network).values() for p in b.parameters() if not p.requires_grad]
    pieces = len(blocks_of(base.network))
    offload = Offload(base.network, base.device)
    recompute(adapter)
    assert offload.bytes == sum(p.nbytes for p in frozen) and len(frozen) > 5 * pieces
    with torch.no_grad():
        base.denoise(*inputs(base))
    assert offload.copies == pieces
    base.denoise(*inputs(base)).sum().backward()
    assert offload.copies == 3 * pieces, "forward, and again for the backward"


class Streams:
    """Stands for a GPU's streams: notes in which order copies and waits for them are asked for."""

    def __init__(self):
        self.events = 0

    def record_event(self):
        self.events += 1
        return SimpleNamespace(synchronize=lambda: None)

    def wait_event(self, event):
        assert event is not None


def test_the_next_block_is_on_its_way_while_one_is_at_work(monkeypatch):
    """From the second update on, whichever way a pass goes and wherever it ends; no copy is made in vain but where
    the same blocks lead on to different ones."""
    base, adapter = adapted()
    plain = step(base, adapter)
    offload = Offload(base.network, base.device)
    recompute(adapter)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Streams())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    offload.stream = Streams()

    fetched, late, fetch, copy = [], [], offload._fetch, offload._copy
    monkeypatch.setattr(offload, "_fetch", lambda path: fetched.append(path) or fetch(path))
    monkeypatch.setattr(offload, "_copy", lambda path: late.append(path == fetched[-1]) or copy(path))
    step(base, adapter)
    assert all(late[:2]), "nothing is known of the first pass"
    fetched.clear(), late.clear()
    assert all(a.equal(b) for a, b in zip(plain, step(base, adapter), strict=True))
    assert len(offload.worked) <= 2, "the host is no more than a block ahead"
    assert late.count(False) >= len(fetched) - 4 and len(late) <= len(fetched) + 4


def test_an_offloaded_network_takes_a_second_adapter():
    """As the self-test of a saved LoRA does."""
    base, adapter = adapted()
    Offload(base.network, base.device)
    recompute(adapter)
    meant = base.denoise(*inputs(base)).detach()
    base.network.add_adapter(base.network.peft_config["default"], "second")
    base.network.set_adapters("second")
    assert not base.denoise(*inputs(base)).equal(meant)
    base.network.set_adapters("default")
    base.network.delete_adapters("second")
    assert base.denoise(*inputs(base)).equal(meant)


def test_a_network_that_is_trained_whole_is_computed_again_too():
    base = load_base("digits")
    whole = Whole(base.network)
    x, condition = torch.randn(2, 4, 16, 16), base.encode_prompts(["3", "7"])

    def gradients():
        base.network.zero_grad()
        base.denoise(x, TICKS, condition).square().mean().backward()
        return [p.grad.clone() for p in whole.parameters()]

    plain = gradients()
    recompute(whole)
    assert all(a.equal(b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(("family", "offloaded"), [("sd15", False), ("sd3", True)])
def test_steps_after_the_first_compile_nothing(family, offloaded):
    """With the adapter on and off, with and without gradients."""
    torch._dynamo.reset()
    base, adapter = adapted(family)
    plain = step(base, adapter)
    adapter.switch_by_number()
    assert compile_blocks(base.network, backend="eager") == len(blocks_of(base.network))
    if offloaded:
        Offload(base.network, base.device)
    recompute(adapter)
    for actual, meant in zip(step(base, adapter), plain, strict=True):
        torch.testing.assert_close(actual, meant, atol=1e-5, rtol=1e-4)
    step(base, adapter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(base, adapter)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
@torch.no_grad()
def test_a_number_that_is_zero_leaves_the_bare_base(family):
    """To the bit, at a size that leaves no map of one pixel, whose strides are anyone's guess."""
    base, adapter = adapted(family)
    points = inputs(base, side=64)
    with adapter.off():
        bare = base.denoise(*points)
    adapter.switch_by_number()
    with adapter.off():
        assert base.denoise(*points).equal(bare)
    assert not base.denoise(*points).equal(bare)


def test_a_number_switches_through_nested_blocks_and_exceptions():
    base, adapter = adapted()
    adapter.switch_by_number()
    layer = next(iter(adapter.layers.values()))
    with pytest.raises(RuntimeError, match="inside"), adapter.off():
        with adapter.off():
            assert layer.scaling["default"] == 0
        assert layer.scaling["default"] == 0 and adapter.is_off
        raise RuntimeError("inside")
    assert layer.scaling["default"] == 0.5 and not adapter.is_off


def test_a_backend_that_is_absent_is_said(monkeypatch):
    def broken(_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(blocks.torch, "compile", broken)
    with pytest.raises(ValueError, match=r"on this cpu: .*compiler found\. Install a C\+\+ compiler .*compile=false"):
        check_compiler(torch.device("cpu"))
