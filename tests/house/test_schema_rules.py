"""What the schema record calls a break, and what it only wants recorded (see host/schemas.py)."""

import copy
import json
import re

import pytest

from host import schemas

MODEL = {"name": "model", "type": "MODEL"}
STEPS = {"name": "steps", "type": "INT", "default": 0, "min": 0, "max": 100, "step": 1}
MODE = {"name": "mode", "type": "COMBO", "default": "even", "options": ["even", "lcm"]}
LATENT, IMAGE = {"name": "latent", "type": "LATENT"}, {"name": "image", "type": "IMAGE"}
BEFORE = {"PCMNode": {"display_name": "Node", "inputs": [MODEL, STEPS, MODE], "outputs": [LATENT]}}
BREAKS, ONLY_RECORD = "If that is meant, record it", "Saved graphs stay as they are: record it"


def after(**changes):
    return {"PCMNode": {**copy.deepcopy(BEFORE["PCMNode"]), **changes}}


@pytest.mark.parametrize(
    ("found", "says", "then"),
    [
        ({}, "PCMNode is gone or renamed", BREAKS),
        (after(inputs=[MODEL, MODE]), "PCMNode: input steps is gone or renamed", BREAKS),
        (after(inputs=[MODEL, MODE, STEPS]), "PCMNode: the inputs are in another order", BREAKS),
        (after(inputs=[MODEL, {**STEPS, "default": 4}, MODE]), "input steps: default was 0 and is 4", BREAKS),
        (after(inputs=[MODEL, {**STEPS, "max": 50}, MODE]), "input steps: max was 100 and is 50", BREAKS),
        (after(inputs=[MODEL, {**STEPS, "type": "FLOAT"}, MODE]), "input steps: type was", BREAKS),
        (after(inputs=[MODEL, STEPS, {**MODE, "options": ["even"]}]), "input mode: options was", BREAKS),
        (after(inputs=[{**MODEL, "control_after_generate": True}, STEPS, MODE]), "control_after_generate was", BREAKS),
        (after(outputs=[{**LATENT, "type": "IMAGE"}]), "output latent: type was", BREAKS),
        (after(outputs=[IMAGE, LATENT]), "new output image is not last", "Put it last."),
        (after(inputs=[MODEL, {**STEPS, "name": "new"}, STEPS, MODE]), "new input new is not last", "Put it last."),
        (after(inputs=[MODEL, STEPS, MODE, IMAGE]), "new input image has no default", "Give it one."),
        (after(inputs=[MODEL, STEPS, MODE, {**IMAGE, "optional": True}]), "input image is new, and last", ONLY_RECORD),
        (after(inputs=[MODEL, STEPS, MODE, {**STEPS, "name": "new"}]), "input new is new, and last", ONLY_RECORD),
        (after(inputs=[MODEL, {**STEPS, "max": 200}, MODE]), "input steps: max was 100 and is 200", ONLY_RECORD),
        (after(inputs=[MODEL, STEPS, {**MODE, "options": ["even", "lcm", "tcd"]}]), "mode: options was", ONLY_RECORD),
        (after(inputs=[MODEL, {**STEPS, "advanced": True}, MODE]), "input steps: advanced was null", ONLY_RECORD),
        (after(outputs=[LATENT, IMAGE]), "output image is new, and last", ONLY_RECORD),
        (after(display_name="Better"), "PCMNode: is called 'Better' now", ONLY_RECORD),
        ({**BEFORE, "PCMOther": BEFORE["PCMNode"]}, "PCMOther is new", ONLY_RECORD),
    ],
)
def test_a_difference_is_a_sentence(found, says, then):
    (line,) = schemas.differences(BEFORE, found)
    assert says in line and then in line
    assert (BREAKS in line) + (ONLY_RECORD in line) <= 1


def test_a_renamed_input_is_a_lost_one_and_a_new_one_in_the_wrong_place():
    found = after(inputs=[MODEL, {**STEPS, "name": "number"}, MODE])
    lines = schemas.differences(BEFORE, found)
    assert [re.search(r"input (\w+)", line)[1] for line in lines] == ["steps", "number"]


def test_the_same_schema_has_no_difference():
    assert schemas.differences(BEFORE, copy.deepcopy(BEFORE)) == []


def test_a_schema_is_taken_from_what_the_host_says():
    """Files of the user, tooltips and flags that are off are no part of it; a default that is off is."""
    kind = {
        "display_name": "Node",
        "input": {
            "required": {
                "lora": ["COMBO", {"options": ["mine.safetensors"], "multiselect": False, "tooltip": "A file."}],
                "steps": ["INT", {"default": 0, "min": 0, "control_after_generate": False}],
            },
            "optional": {"overwrite": ["BOOLEAN", {"default": False}]},
            "hidden": {"unique_id": ["UNIQUE_ID"]},
        },
        "output": ["LATENT"],
        "output_name": ["latent"],
    }
    found = schemas.schemas({"PCMNode": kind})
    assert found["PCMNode"]["inputs"] == [
        {"name": "lora", "type": "COMBO"},
        {"name": "steps", "type": "INT", "default": 0, "min": 0},
        {"name": "overwrite", "type": "BOOLEAN", "default": False, "optional": True},
    ]
    assert found["PCMNode"]["outputs"] == [LATENT]
    assert json.loads(schemas.file_text(found)) == found
