"""The adversarial loss: who learns from what, the exact noise, and the heads' checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from phased_consistency.trainer.efficiency.blocks import recompute
from phased_consistency.trainer.families import load_base
from phased_consistency.trainer.families.sd15 import SD15
from phased_consistency.trainer.lora.adapter import Adapter
from phased_consistency.trainer.objectives.discriminator import Discriminator
from phased_consistency.trainer.training.adversary import Adversary, Judged
from phased_consistency.trainer.training.loop import RunFailed, train
from support.runs import metadata, other_precision, sha256, small_config

ADVERSARIAL = {"adversarial__weight": 0.5, "adversarial__lr": 1e-3, "adversarial__width": 32}
EDGE, TOP = torch.tensor([0, 250]), torch.tensor([200, 500])


@pytest.fixture(scope="module")
def parts():
    """A base with an adapter that is not the identity, and its adversary at 32 pixels."""
    base = load_base("tiny-sd15")
    adapter = Adapter(base.network, base.lora_targets, rank=4, alpha=4.0, seed=0)
    for name, parameter in adapter.named_parameters().items():
        if name.endswith("lora_B"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    condition = base.encode_prompts(["a red star", "a blue ring"])
    return base, adapter, condition, Adversary(base, adapter, base.encode_prompts([""]), 32, width=32, seed=0)


def points(seed):
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def judged(student=2, target=3):
    return Judged(TOP, points(student), points(target))


def test_each_loss_reaches_its_own_weights_alone(parts):
    _, adapter, condition, adversary = parts
    student = points(0).requires_grad_()
    generator, discriminator = adversary.losses(student, points(1), EDGE, judged(), condition)
    assert generator.shape == discriminator.shape == (2,)
    (generator.sum() + discriminator.sum()).backward()
    together = [p.grad.clone() for p in adversary.heads.parameters()]
    weights = [g for g in together if g.ndim > 1]  # the hinges' two halves may cancel in a bias
    assert student.grad.abs().sum() > 0 and all(g.abs().sum() > 0 for g in weights)
    assert all(p.grad is None for p in adapter.parameters())
    adversary.heads.zero_grad()
    student.grad = None
    adversary.losses(student, points(1), EDGE, judged(), condition)[1].sum().backward()
    assert student.grad is None
    for parameter, grad in zip(adversary.heads.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_the_losses_are_hinges(parts):
    """At logits a on fake and b on real: G = relu(1 - a), D = relu(1 + a) + relu(1 - b)."""
    _, _, condition, adversary = parts
    state = {k: v.clone() for k, v in adversary.heads.state_dict().items()}
    try:
        with torch.no_grad():
            for head in adversary.heads.heads:
                head.leave.weight.zero_()
                head.leave.bias.fill_(0.25)
        generator, discriminator = adversary.losses(points(0), points(1), EDGE, judged(), condition)
        assert generator.tolist() == [0.75, 0.75] and discriminator.tolist() == [2.0, 2.0]
        with torch.no_grad():
            for head in adversary.heads.heads:
                head.leave.bias.fill_(3.0)
        generator, discriminator = adversary.losses(points(0), points(1), EDGE, judged(), condition)
        assert generator.tolist() == [0.0, 0.0] and discriminator.tolist() == [4.0, 4.0]
    finally:
        adversary.heads.load_state_dict(state)


def test_equal_predictions_with_equal_noise_cannot_be_told_apart(parts):
    """Self-consistency ends the game: both losses are then at their value for one and the same input."""
    _, _, condition, adversary = parts
    one = points(0)
    generator, discriminator = adversary.losses(one, one, EDGE, judged(2, 2), condition)
    with adversary.adapter.off(), torch.no_grad():
        logits = adversary.heads(adversary._features(one, EDGE, TOP, points(2), condition))
    per_map = lambda f: torch.stack([f(x).flatten(1).mean(1) for x in logits]).mean(0)  # noqa: E731
    torch.testing.assert_close(generator.detach(), per_map(lambda x: (1 - x).relu()))
    torch.testing.assert_close(discriminator.detach(), per_map(lambda x: (1 + x).relu() + (1 - x).relu()))


def test_the_body_is_the_bare_base_at_the_level_it_is_told(parts):
    """Features of the re-noised point, by a plain forward pass of the base without any adapter."""
    base, _, condition, adversary = parts
    seen, level, x = [], base.schedule, points(0)
    plain = load_base("tiny-sd15")
    ratio = (level.alpha(TOP) / level.alpha(EDGE)).view(-1, 1, 1, 1)
    fresh = level.sigma(TOP).view(-1, 1, 1, 1).square() - (ratio * level.sigma(EDGE).view(-1, 1, 1, 1)).square()
    x_r = ratio * x + fresh.sqrt() * points(2)
    with adversary.adapter.off(), torch.no_grad():
        features = adversary._features(x, EDGE, TOP, points(2), condition)
    for block in (*plain.network.down_blocks, plain.network.mid_block):
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        plain.denoise(x_r, TOP, condition)
    assert len(features) == len(seen) == 4
    for ours, theirs in zip(features, seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_heads_learn_to_tell_two_kinds_of_picture(parts):
    """Student's points shifted against the target's: the discriminator's loss falls well below its start of 2."""
    _, _, condition, adversary = parts
    optimizer = torch.optim.AdamW(adversary.heads.parameters(), lr=5e-3)
    losses = []
    for step in range(20):
        student, target = points(2 * step) + 1.0, points(2 * step + 1)
        loss = adversary.losses(student, target, EDGE, judged(step, step + 1), condition)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.5) and sum(losses[-5:]) / 5 < 1


def test_the_default_heads_are_small_on_every_family():
    """The published SD1.5 heads hold 664 million parameters."""
    for channels in ([320, 640, 1280, 1280, 1280], [320, 640, 1280, 1280], [1536] * 4, [2432] * 4):
        size = sum(p.numel() for p in Discriminator(channels, width=256, seed=0).parameters())
        assert 0.5e6 < size < 4e6


def run(folder, **changes):
    """A short adversarial run's configuration; the runs of a test share their cache."""
    often = {"train__save_every": 2, "data__cache": folder.parent / "cache"}
    return small_config(folder, **often | ADVERSARIAL | changes)


def test_an_adversarial_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = train(run(tmp_path / "whole"))
    step = SD15.features

    def stop(self, *args):
        if len(list((tmp_path / "cut" / "checkpoints").glob("*"))) and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return step(self, *args)

    stopped = []
    monkeypatch.setattr(SD15, "features", stop)
    with pytest.raises(RunFailed, match="Interrupted. The last checkpoint, step-0000002, is kept"):
        train(run(tmp_path / "cut"))
    resumed = train(run(tmp_path / "cut"))
    assert stopped and sha256(resumed) == sha256(whole)
    assert sha256(train(run(tmp_path / "plain", adversarial__weight=0))) != sha256(whole)


def test_a_checkpoint_without_its_heads_is_refused(tmp_path):
    config = run(tmp_path / "run", train__save_every=2)
    train(config)
    checkpoints = config.run_folder / "checkpoints"
    for file in checkpoints.glob("step-0000004*"):
        file.unlink()
    (left,) = checkpoints.glob("*")
    tensors, facts = load_file(left), metadata(left)
    assert any(k.startswith("discriminator/heads.0.enter") for k in tensors)
    save_file({k: v for k, v in tensors.items() if not k.startswith("discriminator/")}, left, facts)
    with pytest.raises(ValueError, match="The checkpoint lacks the discriminator of this run; without it"):
        train(config)


def test_a_run_in_bf16_ends_with_a_good_file(tmp_path):
    changes = {"base__dtype": "bf16", "train__gradient_checkpointing": "true", "train__steps": 2, **ADVERSARIAL}
    with other_precision():
        train(small_config(tmp_path / "run", **changes))
    assert metadata(tmp_path / "run" / "pcm-lora.safetensors")["ss_mixed_precision"] == "bf16"


def test_a_broken_discriminator_stops_the_run(tmp_path):
    with pytest.raises(RunFailed, match="The (loss|gradient) is not finite at update"):
        train(run(tmp_path / "run", adversarial__lr=1e30, train__steps=6, train__save_every=10))


def test_gradient_checkpointing_changes_no_gradient(parts):
    """The body is computed again without the adapter, the student with it."""
    base, _, condition, _ = parts

    def gradients(checkpointed):
        own = load_base("tiny-sd15")
        adapter = Adapter(own.network, own.lora_targets, rank=2, alpha=2.0, seed=0)
        if checkpointed:
            recompute(adapter)
        adversary = Adversary(own, adapter, base.encode_prompts([""]), 32, width=16, seed=0)
        student = own.denoise(points(0), TOP, condition)
        adversary.losses(student, points(1), EDGE, judged(), condition)[0].sum().backward()
        return [p.grad for n, p in adapter.named_parameters().items() if n.endswith("lora_B")]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)
