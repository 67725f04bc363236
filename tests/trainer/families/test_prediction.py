"""eps or v, zero terminal SNR or not: found in files, told by people, tried on the network; never guessed."""

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from phased_consistency.samplers.lora_file import LoraHeader, TensorInfo
from phased_consistency.trainer.families import load_base, look_at_base
from phased_consistency.trainer.families.prediction import Finding, found_in_header, found_in_scheduler, settle
from phased_consistency.trainer.lora.recipe import recipe_for
from phased_consistency.trainer.tiny.bundled import bundled_folder
from phased_consistency.trainer.tiny.making import pixels_of, random_scenes
from support.bases import make_sdxl_folder, make_sdxl_parts
from support.ldm_checkpoint import save_single_file
from support.runs import small_config

EPS, V = "epsilon", "v_prediction"
SAYS_EPS = Finding(EPS, False, "scheduler_config.json")


@pytest.fixture
def header(tmp_path):
    def header(tensors=(), **metadata):
        infos = {name: TensorInfo("F32", (0,)) for name in tensors}
        return LoraHeader(tmp_path / "base.safetensors", infos, {k.replace("__", "."): v for k, v in metadata.items()})

    return header


@pytest.mark.parametrize(
    ("tensors", "metadata", "prediction", "zero_snr"),
    [
        ((), {}, None, None),
        (("v_pred",), {}, V, None),
        (("v_pred", "ztsnr"), {}, V, True),
        ((), {"modelspec__prediction_type": "v"}, V, None),
        ((), {"modelspec__prediction_type": "epsilon"}, EPS, None),
        ((), {"modelspec__predict_key": "v"}, V, None),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, V, True),
        ((), {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, None, None),
        (("v_pred",), {"modelspec__prediction_type": "epsilon"}, V, None),
        # ComfyUI writes this for every model whose v-prediction a node has set
        ((), {"modelspec__predict_key": "epsilon"}, None, None),
    ],
)
def test_single_files_say_it_by_tensors_or_header(header, tensors, metadata, prediction, zero_snr):
    actual = found_in_header(header(tensors, **metadata))
    assert (actual.prediction, actual.zero_terminal_snr) == (prediction, zero_snr)
    assert "base.safetensors" in actual.where


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_edm_files_are_refused(header, marker):
    with pytest.raises(ValueError, match=f"base.safetensors holds a tensor {marker}: it is an EDM base"):
        found_in_header(header(["v_pred", marker]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "is an EDMEulerScheduler: it is an EDM base"),
        ({"prediction_type": "sample"}, "predicting 'sample'. is no schedule of SD1.5 or SDXL"),
        ({"beta_start": None}, "is no schedule of SD1.5 or SDXL: needed are beta_start"),
        ({"trained_betas": [0.1, 0.2]}, "is no schedule of SD1.5 or SDXL"),
    ],
)
def test_other_schedulers_are_refused(tmp_path, change, message):
    config = {k: v for k, v in (dict(DDIMScheduler().config) | change).items() if v is not None}
    (tmp_path / "s.json").write_text(json.dumps(config | {"_class_name": change.get("_class_name", "DDIMScheduler")}))
    with pytest.raises(ValueError, match=message):
        found_in_scheduler(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("found", "told", "settled"),
    [
        ((None, None), (None, None), (EPS, False)),
        ((None, None), (V, True), (V, True)),
        ((None, None), (V, None), (V, False)),
        ((V, True), (None, None), (V, True)),
        ((V, None), (V, True), (V, True)),
        ((EPS, None), (EPS, False), (EPS, False)),
    ],
)
def test_what_is_told_adds_to_what_is_found(found, told, settled):
    assert settle(Finding(*found, "a file"), SAYS_EPS, *told) == settled


@pytest.mark.parametrize(
    ("found", "told", "message"),
    [
        ((V, None), (EPS, None), "a file says that the base predicts v_prediction, base.prediction says epsilon"),
        ((V, True), (V, False), "a file says that the base has zero terminal SNR, base.zero_terminal_snr says"),
        ((None, None), (None, True), "Zero terminal SNR needs v-prediction.*Set base.prediction=v_prediction"),
        ((None, True), (EPS, None), "Zero terminal SNR needs v-prediction"),
        ((None, None), ("flow", None), "base.prediction is 'flow'; SD1.5 and SDXL have 'epsilon' and 'v_prediction'"),
    ],
)
def test_contradictions_are_sentences(found, told, message):
    with pytest.raises(ValueError, match=message):
        settle(Finding(*found, "a file"), SAYS_EPS, *told)


def test_a_folders_v_may_not_be_contradicted_but_its_epsilon_may():
    """Converters write epsilon when they know no better; the network itself is tried when training starts."""
    assert load_base("tiny-sd15").prediction == EPS
    assert load_base("tiny-sd15", prediction=V).prediction == V
    with pytest.raises(ValueError, match="scheduler_config.json says that the base predicts v_prediction"):
        load_base("tiny-sdxl", prediction=EPS)


def test_a_marked_sdxl_file_is_loaded_as_what_it_says(tiny_base, tmp_path):
    words, folder = tiny_base.tokenizers[0], tmp_path / "folder"
    make_sdxl_folder(folder, words)
    path = tmp_path / "v.safetensors"
    save_single_file(path, **vars(make_sdxl_parts(words)), markers=("v_pred", "ztsnr"))
    options = {"family": "sdxl", "config": str(folder), "tokenizer": str(folder)}
    base = load_base(str(path), **options)
    assert (base.prediction, base.zero_terminal_snr) == (V, True)
    assert base.schedule.alpha(1000) == 0 and base.schedule.sigma(1000) == 1
    with pytest.raises(
        ValueError, match=r"v.safetensors \(its tensor v_pred\) says that the base predicts v_prediction"
    ):
        load_base(str(path), **options, prediction=EPS)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_are_those_of_diffusers(tiny_base, tmp_path, zero_snr):
    scheduler = {"prediction_type": V, "rescale_betas_zero_snr": zero_snr}
    make_sdxl_folder(tmp_path, tiny_base.tokenizers[0], **scheduler)
    schedule = load_base(str(tmp_path)).schedule
    betas = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").betas
    bar = (1 - (rescale_zero_terminal_snr(betas) if zero_snr else betas)).cumprod(0)
    ticks = torch.arange(1, 1001)
    torch.testing.assert_close(schedule.alpha(ticks), bar.sqrt(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(schedule.sigma(ticks), (1 - bar).sqrt(), atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def pictures(tiny_base):
    """Four of the tiny bases' pictures as latents (they share their autoencoder), and their captions."""
    scenes = random_scenes(4)
    pixels = torch.stack([pixels_of(scene) for scene in scenes]).float().div(127.5).sub(1)
    return tiny_base.encode_images(pixels)[0], [scene.caption for scene in scenes]


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sdxl"])
def test_a_trained_network_tells_what_it_predicts(pictures, name):
    base, (x0, captions) = load_base(name), pictures
    condition = base.encode_prompts(captions)
    base.check_prediction(x0, condition)
    other = {EPS: V, V: EPS}[base.prediction]
    with pytest.raises(ValueError, match=f"{name} predicts {base.prediction}, not {other}.*Set base.prediction="):
        dataclasses.replace(base, prediction=other).check_prediction(x0, condition)


def test_a_wrong_mark_has_to_go_first(pictures, tiny_base, tmp_path):
    """`settle` lets nobody contradict a v: what it says is no help where the network predicts eps."""
    x0, captions = pictures
    folder = tmp_path / "folder"
    shutil.copytree(bundled_folder("tiny-sd15"), folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": V}))
    base = load_base(str(folder))
    condition = base.encode_prompts(captions)
    with pytest.raises(ValueError, match="folder/scheduler/scheduler_config.json says otherwise: set its predict"):
        base.check_prediction(x0, condition)
    parts = {"unet": tiny_base.network, "text_encoder": tiny_base.text_encoders[0]}
    file = save_single_file(tmp_path / "v.safetensors", **parts, markers=("v_pred",))
    base = dataclasses.replace(base, path=str(file))
    with pytest.raises(ValueError, match=r"v.safetensors \(its tensor v_pred\) says otherwise: remove that mark from"):
        base.check_prediction(x0, condition)


@pytest.mark.parametrize(
    ("scheduler", "told", "settled"),
    [
        ({"prediction_type": V, "rescale_betas_zero_snr": True}, {}, (V, True)),
        ({"prediction_type": V}, {"base__zero_terminal_snr": True}, (V, True)),
        ({}, {"base__prediction": V}, (V, False)),
    ],
)
def test_a_dry_run_tells_of_the_recipe_that_the_run_writes(tiny_base, tmp_path, scheduler, told, settled):
    make_sdxl_folder(tmp_path / "base", tiny_base.tokenizers[0], **scheduler)
    config = small_config(tmp_path / "run", base__path=tmp_path / "base", **told)
    options = {k.removeprefix("base__"): v for k, v in told.items()}
    early = look_at_base(str(tmp_path / "base"), **options)
    loaded = load_base(str(tmp_path / "base"), **options).facts
    assert (early.prediction, early.zero_terminal_snr) == settled
    assert early == dataclasses.replace(loaded, base_hash="")
    assert recipe_for(config, early) == recipe_for(config, dataclasses.replace(loaded, base_hash=""))


def test_a_dry_run_finds_contradictions(tiny_base, tmp_path):
    parts = make_sdxl_parts(tiny_base.tokenizers[0])
    path = save_single_file(tmp_path / "v.safetensors", **vars(parts), markers=("v_pred", "ztsnr"))
    make_sdxl_folder(tmp_path / "configs", tiny_base.tokenizers[0])
    options = {"config": str(tmp_path / "configs"), "tokenizer": str(bundled_folder("tiny-sd15") / "tokenizer")}
    facts = look_at_base(str(path), family="sdxl", **options)
    assert (facts.prediction, facts.zero_terminal_snr) == (V, True)
    with pytest.raises(ValueError, match="says that the base predicts v_prediction, base.prediction says epsilon"):
        look_at_base(str(path), family="sdxl", **options, prediction=EPS)


def test_random_weights_pass(tiny_base, tmp_path):
    make_sdxl_folder(tmp_path, tiny_base.tokenizers[0])
    base = load_base(str(tmp_path))
    for prediction in (EPS, V):
        variant = dataclasses.replace(base, prediction=prediction)
        variant.check_prediction(torch.randn(2, 4, 8, 8), base.encode_prompts(["a", "b"]))
