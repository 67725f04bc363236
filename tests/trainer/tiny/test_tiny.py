"""The bundled tiny bases are what they say; their makers train on what diffusers' pipelines feed."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from phased_consistency.trainer.tiny import make_sdxl, making
from phased_consistency.trainer.tiny.scenes import prompts

FOLDER = making.SD15.parent
MEGABYTES = {"sd15": 11.0, "sdxl": 6.3, "emoji": 14.6}  # the last with its LoRA, of 2.2


@pytest.fixture(scope="module")
def sdxl():
    return DiffusionPipeline.from_pretrained(FOLDER / "sdxl").to(torch.float32)


def files(name):
    """A base's files, without the pictures that edits are tried on."""
    return [path for path in (FOLDER / name).rglob("*") if path.is_file() and path.parent.name != "pictures"]


@pytest.mark.parametrize("name", MEGABYTES)
def test_bases_are_small_and_hold_no_pickles(name):
    assert {path.suffix for path in files(name)} <= {".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in files(name)) <= MEGABYTES[name] * 1e6


def test_pictures_to_edit_are_small():
    pictures = [path for path in (FOLDER / "emoji" / "pictures").rglob("*") if path.is_file()]
    assert pictures and {path.suffix for path in pictures} == {".png"}
    assert sum(path.stat().st_size for path in pictures) <= 0.1e6


def test_all_bases_together_are_small():
    assert sum(path.stat().st_size for name in MEGABYTES for path in files(name)) <= 36e6


def test_sdxl_shares_prompts_and_vocabulary():
    for file in ("prompts.txt", "tokenizer/tokenizer.json"):
        assert (FOLDER / "sdxl" / file).read_text() == (making.SD15 / file).read_text()


def test_sdxls_schedule_ends_in_noise_alone(sdxl):
    assert sdxl.scheduler.config.prediction_type == "v_prediction" and sdxl.scheduler.alphas_cumprod[-1] == 0


def test_no_caption_is_longer_than_is_trained_on():
    ids = making.token_ids(making.sd15_tokenizer(), prompts(2000, seed=5))
    assert (ids[:, making.CAPTION_TOKENS - 1] == ids[0, -1]).all()
    assert [making.caption_length(step, 10) for step in (0, 7, 8, 9)] == [24, 24, 77, 77]


def test_some_captions_are_replaced_by_the_empty_prompt():
    ids = making.token_ids(making.sd15_tokenizer(), prompts(50, seed=0))
    index = torch.arange(50)
    assert torch.equal(making.some_empty(ids, index, 0.0), ids[:-1])
    assert torch.equal(making.some_empty(ids, index, 1.0), ids[-1:].expand(50, -1))


def test_micro_conditioning_says_where_a_picture_was_cropped():
    scenes = making.random_scenes(12)
    pixels, time_ids = make_sdxl.draw_crops(scenes)
    assert {row[0] for row in time_ids.tolist()} == {128, 160}
    for scene, picture, row in zip(scenes, pixels, time_ids.int().tolist(), strict=True):
        height, width, top, left, *target = row
        assert height == width and target == [128, 128]
        assert torch.equal(picture, making.pixels_of(scene, height)[:, top : top + 128, left : left + 128])


class Oracle:
    """Stands for a network: keeps what it was fed, and answers with the exact target for the one picture there is."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, noisy, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return SimpleNamespace(sample=self.answer(noisy, *args))


CAPTIONS = prompts(6, seed=2)
INDEX = torch.arange(len(CAPTIONS))
X0 = torch.randn(1, 16, 16, 16)


@pytest.fixture
def exact(monkeypatch):
    """Full precision, and draws that keep every caption."""
    monkeypatch.setattr(make_sdxl, "bf16", nullcontext)
    monkeypatch.setattr(torch, "rand", torch.ones)


@torch.no_grad()
def sdxl_step(pipeline):
    """One training loss, and what the UNet was fed: embeddings, added conditions."""
    alphas_bar, x0 = make_sdxl.sdxl_scheduler().alphas_cumprod, X0[:, :4]

    def answer(noisy, t, _):
        a = alphas_bar[t].view(-1, 1, 1, 1)
        return (a.sqrt() * noisy - x0) / (1 - a).sqrt()

    unet, ids = Oracle(answer), making.token_ids(pipeline.tokenizer, CAPTIONS)
    latents, time_ids = x0.repeat(len(INDEX), 1, 1, 1), torch.full((len(INDEX), 6), 128.0)
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    loss = make_sdxl.v_loss(unet, *encoders, latents, time_ids, ids, 1)(INDEX, 1)
    return loss, unet.args[1], unet.kwargs["added_cond_kwargs"]


def test_sdxl_trains_on_what_its_pipeline_feeds(sdxl, exact):
    loss, context, added = sdxl_step(sdxl)
    embeddings, _, pooled, _ = sdxl.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    assert loss < 1e-6
    torch.testing.assert_close(context, embeddings)
    torch.testing.assert_close(added["text_embeds"], pooled)


def test_sdxl_knows_the_zero_embeddings(sdxl, exact, monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)
    _, context, added = sdxl_step(sdxl)
    assert not context.any() and not added["text_embeds"].any()


@pytest.mark.parametrize(
    "file", sorted(Path(making.__file__).parent.glob("*/tokenizer*/vocab.json")), ids=lambda p: "-".join(p.parts[-3:-1])
)
def test_both_forms_of_a_tokenizer_know_the_same_words(file):
    """transformers 4 and a single file's base.tokenizer read vocab.json, transformers 5 reads tokenizer.json."""
    words = json.loads(file.read_text(encoding="utf-8"))
    whole = json.loads((file.parent / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    assert words == whole["model"]["vocab"] | added and sorted(words.values()) == list(range(len(words)))
