"""Network and encoders on the device in turn: who is where while prompts are encoded and points denoised."""

import pytest
import torch

from phased_consistency.trainer.families import load_base

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Place:
    """Stands for a part of the base: knows only where it is, and how often it was moved."""

    def __init__(self):
        self.device, self.moves = CPU, 0

    def to(self, device):
        device = torch.device(device)
        self.device, self.moves = GPU if device.type == "cuda" else device, self.moves + 1

    def parameters(self):
        yield self


@pytest.fixture
def base(monkeypatch):
    base = load_base("tiny-sd15", in_turn=True)
    monkeypatch.setattr(base, "turns", GPU)
    monkeypatch.setattr(base, "network", Place())
    monkeypatch.setattr(base, "text_encoders", [Place(), Place()])
    monkeypatch.setattr(base, "_encode_prompts", lambda prompts: {})
    monkeypatch.setattr(base, "_denoise", lambda *_: None)
    return base


def places(base):
    return [part.device for part in (base.network, *base.text_encoders)]


def test_one_of_them_is_on_the_device_at_a_time(base):
    assert places(base) == [CPU, CPU, CPU] and base.device == GPU
    base.encode_prompts(["a"])
    assert places(base) == [CPU, GPU, GPU]
    base.denoise(None, None, {})
    assert places(base) == [GPU, CPU, CPU]
    base.encode_prompts(["a"])
    assert places(base) == [CPU, GPU, GPU]


@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
def test_what_is_in_place_is_not_moved(base, monkeypatch, device):
    monkeypatch.setattr(base, "turns", torch.device(device))
    for _ in range(3):
        base.denoise(None, None, {})
    assert [part.moves for part in (base.network, *base.text_encoders)] == [1, 0, 0]


def test_the_network_stays_once_the_encoders_are_dropped(base):
    base.encode_prompts(["a"])
    base.drop_encoders()
    assert base.network.device == GPU and base.text_encoders == [] and base.device == GPU


def test_the_network_comes_once_the_encoders_have_left(base, monkeypatch):
    """With the VAE, too: on 16 GB there is no room for SD3's T5 and its transformer at once."""
    together = []
    vae = Place()
    monkeypatch.setattr(base, "vae", vae)
    parts = {"network": base.network, "vae": vae, "first": base.text_encoders[0], "second": base.text_encoders[1]}
    move = Place.to

    def watched(part, device):
        move(part, device)
        together.append({name for name, part in parts.items() if part.device.type == "cuda"})

    monkeypatch.setattr(Place, "to", watched)
    base._bring(base.vae)
    base.encode_prompts(["a"])
    base.drop_encoders()
    assert together[-1] == {"network"} and {"vae", "first", "second"} in together
    assert not any("network" in there and len(there) > 1 for there in together)


def test_a_base_that_is_asked_for_nothing_leaves_all_in_place():
    base = load_base("tiny-sd15")
    base.network, base.text_encoders = Place(), []
    base._denoise = lambda *_: None
    base.denoise(None, None, {})
    assert base.turns is None and base.network.moves == 0


@pytest.mark.parametrize("path", ["tiny-sd15", "tiny-sdxl", "tiny-emoji"])
def test_every_family_gives_the_same_in_turn(path):
    base, plain = load_base(path, in_turn=True), load_base(path)
    x, tick = torch.randn(1, *base.latent_shape(64)), torch.tensor([500])
    assert base.turns == CPU
    actual, meant = (b.denoise(x, tick, b.encode_prompts(["a star"])) for b in (base, plain))
    assert actual.equal(meant)
