"""A small classifier of the emoji base's pictures: which things they show, and whether that is what a prompt says.

It learns from drawings alone, each the base's kind of scene. A picture is halved in size once more, so that the
autoencoder's blur does not matter. One set of weights answers for the whole picture and for each half of it: a pair is
right when its left half shows the first thing and its right half the second. Half of what it
learns from is gray, so that it looks at shapes too: few things are purple, and fewer brown, and a blot would pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...samplers.emoji_words import GROUNDS, THINGS, Meaning
from ...samplers.writing import written_whole
from .emoji_scenes import EmojiScene, draw_pictures, random_scenes
from .making import bf16
from .resuming import Stage, load_state, put_back, random_of, rate, save_state, tensors_of

VIEW = 64  # pixels of a side that it sees
BATCH = 128
RATE = 3e-3
FRESH = 1_000  # scenes, drawn for nothing else, that its accuracy is measured on
FILE, FACTS = "classifier.safetensors", "classifier.json"


class Classifier(nn.Module):
    """Logits of the things in the whole picture, its left and its right half, and of the ground.

    `features` are what a distance between two sets of pictures is measured on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*_layer(3, 24, 2), *_layer(24, 48, 2), *_layer(48, 96, 2), *_layer(96, 96, 1))
        self.thing = nn.Linear(2 * 96, len(THINGS))
        self.ground = nn.Linear(2 * 96, len(GROUNDS))

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 3, things) of whole, left and right, and (B, grounds), of views (B, 3, VIEW, VIEW)."""
        maps = self.trunk(view)
        left, right = maps.chunk(2, -1)
        regions = torch.stack([_pooled(part) for part in (maps, left, right)], 1)
        return self.thing(F.dropout(regions, 0.2, self.training)), self.ground(regions[:, 0])

    def features(self, pictures: Tensor) -> Tensor:
        """Features (B, 192) of pictures (B, 3, H, W) in [-1, 1]."""
        return _pooled(self.trunk(view_of(pictures)))


def _layer(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    """A convolution of 3 x 3 with its normalisation."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def _pooled(maps: Tensor) -> Tensor:
    """The mean and the largest of each channel, (B, 2 * channels)."""
    return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)


def view_of(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], of any size, as the classifier sees them."""
    return F.interpolate(pictures.float(), (VIEW, VIEW), mode="area")


def gray(view: Tensor) -> Tensor:
    """Views (B, 3, VIEW, VIEW) without their colours, three equal channels of luma (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (view * weights).sum(1, keepdim=True).expand_as(view)


@torch.no_grad()
def agreement(classifier: Classifier, pictures: Tensor, meanings: Sequence[Meaning]) -> Tensor:
    """Whether each picture (N, 3, H, W) in [-1, 1] shows what its prompt names: its thing, or both of a pair.

    Bool (N). A prompt that names no thing is always met. The ground, the size and the pattern do not count.
    """
    logits = torch.cat([classifier(view_of(chunk))[0] for chunk in pictures.split(BATCH)])
    whole, left, right = logits.argmax(-1).unbind(1)
    names = list(THINGS)
    met = []
    for i, meaning in enumerate(meanings):
        seen = (whole[i],) if len(meaning.things) == 1 else (left[i], right[i])
        met.append(all(names[index] == thing for index, thing in zip(seen, meaning.things, strict=False)))
    return torch.tensor(met)


def labels_of(scenes: Sequence[EmojiScene]) -> tuple[Tensor, Tensor]:
    """Things (N, 2) from left to right, a single one's second -1, and grounds (N)."""
    names, grounds = list(THINGS), list(GROUNDS)
    things = [[names.index(spot.thing) for spot in scene.spots] for scene in scenes]
    second_or_none = [pair if len(pair) == 2 else [*pair, -1] for pair in things]
    return torch.tensor(second_or_none), torch.tensor([grounds.index(scene.ground) for scene in scenes])


def classifier_loss(classifier: Classifier, view: Tensor, things: Tensor, grounds: Tensor) -> Tensor:
    """Cross entropy: a single thing's in the whole picture, a pair's in the halves; the ground's, weighted less.

    The batch's first half is made gray, and the ground is asked of the other alone.
    """
    half = len(view) // 2
    view = torch.cat([gray(view[:half]), view[half:]]).to(memory_format=torch.channels_last)
    with bf16():
        logits, ground = classifier(view)
    pair = things[:, 1] >= 0
    answers = torch.cat([logits[~pair, 0], logits[pair, 1], logits[pair, 2]]).float()
    truth = torch.cat([things[~pair, 0], things[pair, 0], things[pair, 1]])
    return F.cross_entropy(answers, truth, label_smoothing=0.05) + 0.3 * F.cross_entropy(
        ground[half:].float(), grounds[half:]
    )


def roughened(view: Tensor, random: torch.Generator) -> Tensor:
    """Views as a worse painter's: three in ten batches blurred, all with noise and a shift of their colours."""
    if torch.rand((), generator=random) < 0.3:
        view = F.interpolate(F.avg_pool2d(view, 2), scale_factor=2, mode="bilinear")
    noise = 0.15 * torch.rand((), generator=random) * torch.randn(view.shape, generator=random)
    return view + noise + 0.05 * torch.randn(len(view), 3, 1, 1, generator=random)


def train_classifier(views: Tensor, scenes: Sequence[EmojiScene], stage: Stage, state: Path) -> Classifier:
    """Train it on uint8 views (N, 3, VIEW, VIEW) of scenes, going on from `state` where that file is."""
    torch.manual_seed(0)
    classifier = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=1e-2)
    if saved := load_state(state):
        put_back(saved[0], {"classifier": classifier}, {"adamw": optimizer})
        stage.go_on(saved[1])
    things, grounds = labels_of(scenes)
    while stage.share < 1:
        random = random_of("classifier", stage.step)
        index = torch.randint(len(views), (BATCH,), generator=random)
        view = roughened(scaled(views[index]), random)
        torch.manual_seed(stage.step)  # for dropout
        loss = classifier_loss(classifier, view, things[index], grounds[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * rate(stage.share, stage.step, warm_up=50, constant=0.2)
        optimizer.step()
        stage.advance(loss.item())
        if stage.is_due() or stage.share >= 1:
            save_state(state, tensors_of({"classifier": classifier}, {"adamw": optimizer}), stage.facts)
    return classifier.eval().requires_grad_(False)


def scaled(pixels: Tensor) -> Tensor:
    """Uint8 pixels in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def accuracy(classifier: Classifier, seed: int = -2, count: int = FRESH) -> dict[str, float]:
    """The shares of fresh drawings whose thing it finds, and of pairs whose both things it finds."""
    shares = {}
    for kind, pairs in (("singles", 0.0), ("pairs", 1.0)):
        scenes = random_scenes(count, seed, pairs)
        meanings = [Meaning(tuple(spot.thing for spot in scene.spots)) for scene in scenes]
        shares[kind] = round(agreement(classifier, scaled(draw_pictures(scenes)), meanings).float().mean().item(), 4)
    return shares


def save_classifier(classifier: Classifier, folder: Path, facts: dict[str, float]) -> None:
    """Write its weights in fp16, and beside them the facts about it and the things it knows, in their order."""
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in classifier.state_dict().items()
    }
    with written_whole(folder / FILE) as part:
        part.write_bytes(save({name: tensor.contiguous() for name, tensor in weights.items()}))
    content = {"accuracy on fresh drawings": facts, "things": list(THINGS), "grounds": list(GROUNDS)}
    (folder / FACTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a base's folder. Raises FileNotFoundError where it has none, ValueError for other words."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts["things"] != list(THINGS) or facts["grounds"] != list(GROUNDS):
        raise ValueError(f"{folder / FILE} was trained on other things than the base's language has: train it again.")
    classifier = Classifier()
    classifier.load_state_dict(
        {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(folder / FILE).items()
        }
    )
    return classifier.eval().requires_grad_(False)
