"""LoRAs of every kind on models of every kind: Load PCM LoRA gives what ComfyUI's own loader gives, to the bit; where
that has no patch, what the definition gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from host import lora_table
from host.graphs import loaded
from host.helper_formats import FORMATS, GGUF
from host.lora_kinds import NAMES, NOT_IN_CORE
from host.server import out
from host.test_loader import refusal, report
from host.tiny import RECIPE
from phased_consistency.samplers.recipe import HEADER_KEY


@pytest.fixture(scope="module")
def packed(server, models) -> list[str]:
    """The packed formats that the tiny checkpoint is there in."""
    return lora_table.packed(server, models.folder)


@pytest.mark.parametrize(("base", "strength"), [("tiny", 0.7), *((base, 1.0) for base in lora_table.BASES)])
def test_every_kind_is_what_core_makes_of_it(server, packed, base, strength):
    if base in (*FORMATS, *GGUF) and base not in packed:
        pytest.skip(f"no {base}: {'ComfyUI-GGUF is not in custom_nodes' if base in GGUF else 'this host knows none'}")
    for row in lora_table.rows(server, base, strength):
        # the definition takes a strength in another order, which rounds otherwise
        allowed = 1e-3 * row.effect if row.kind in NOT_IN_CORE and strength != 1 else 0
        assert row.effect > 1e-3 and row.off <= allowed and row.taken == row.held > 0, row


def changed(models, name: str, change) -> str:
    """A copy of the kohya LoRA with other tensors; returns its file name."""
    loras = models.folder / "loras"
    metadata = {HEADER_KEY: RECIPE.to_header()}
    save_file(change(load_file(loras / "unnamed.safetensors")), loras / f"{name}.safetensors", metadata)
    return f"{name}.safetensors"


def test_integers_are_the_cause(server, models):
    def whole_numbers(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v if k.endswith("alpha") else (100 * v).to(torch.int8) for k, v in lora.items()}

    message = refusal(server, changed(models, "integers", whole_numbers))
    n = len(models.lora)
    assert message.startswith(
        f"integers.safetensors does nothing to this SD1.5 model: {n} of {n} modules are integers without their scales: "
    )


def test_a_half_is_the_cause(server, models):
    def without(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in lora.items() if k != "lora_unet_conv_in.lora_up.weight"}

    said = report(server, changed(models, "half", without)).splitlines()
    assert said[0] == f"1 of {len(models.lora)} modules are half there: get the file again."
    assert said[-1] == "Not taken: lora_unet_conv_in."


def test_another_shape_is_the_cause(server, models):
    def wide(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return lora | {"lora_unet_conv_in.lora_up.weight": torch.zeros(640, 8, 1, 1)}

    said = report(server, changed(models, "wide", wide)).splitlines()
    assert (
        said[0] == f"1 of {len(models.lora)} modules are of another shape than this model's: take a LoRA made for it."
    )


CHANGED_MODELS = {  # how another node has changed the model -> what is said
    "compiled": "{n} of {n} modules do not reach a compiled model: compile it after this node.",
    "packed": "{n} of {n} modules meet weights packed in an unknown way: load another format of the checkpoint.",
}


@pytest.mark.parametrize("how", CHANGED_MODELS)
def test_a_model_that_takes_nothing_is_the_cause(server, models, how):
    """With a compiled one, core's loader drops all of a LoRA without a word."""
    graph, links = loaded()
    lora = changed(models, "attention", attention_alone)
    changing = graph.add("TestOtherPack", model=links["base"], how=how)
    info = graph.add("PCMLoraInfo", lora=lora, model=out(changing))
    n = len(attention_alone(load_file(models.folder / "loras" / "unnamed.safetensors"))) // 3
    run = server.run(graph)
    assert run.error is None, run.error["exception_message"]
    assert CHANGED_MODELS[how].format(n=n) in run.text(info)


def attention_alone(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in lora.items() if "attn" in name}


def test_what_nobody_knows_is_not_said_to_be_used(server, models):
    strange = {"bundle_emb.x.clip_l": torch.ones(2, 64), "lora_unet_conv_in.vera_lambda_d": torch.ones(8)}
    said = report(server, changed(models, "strange", lambda lora: lora | strange)).splitlines()
    assert "2 tensors are no LoRA's and are not used, such as bundle_emb.x.clip_l." in said
    assert not any("left to the host" in line for line in said)


def test_the_files_are_those_that_are_named(models):
    made = {path.name for path in Path(models.folder, "loras").glob("*.core.safetensors")}
    assert made == {f"{name}.core.safetensors" for name in NAMES if name not in NOT_IN_CORE}
