"""What shape of weight a host means by each LoRA name, in models without weights, as its own Python says it.

python lora_targets.py HOST_FOLDER < [{"weights": {name: shape}, "names": [...]}] > [{"kind": ..., "shapes": {...}}]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def ask(host: Path, questions: list[dict]) -> list[dict]:
    """The host's answers, from one process for all."""
    from host.server import environment, python_of

    options = {"capture_output": True, "text": True, "timeout": 240, "cwd": host, "env": environment()}
    run = subprocess.run([python_of(host), __file__, str(host)], input=json.dumps(questions), **options)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def main() -> None:
    sys.path[0] = sys.argv[1]  # not this file's own folder, which has a server.py too
    questions = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # the host prints
    from comfy.cli_args import args

    args.cpu = True
    json.dump([answer(question) for question in questions], answers)


def answer(question: dict) -> dict:
    """Within the host's process: the kind of model that the weights make, and the shape that each name stands for."""
    import comfy.lora
    import comfy.model_detection
    import torch

    weights = {name: torch.empty(shape, device="meta") for name, shape in question["weights"].items()}
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(weights, "", device="meta")
    targets, held = comfy.lora.model_lora_keys_unet(model, {}), model.state_dict()

    def shape(name: str) -> list[int] | None:
        if name not in targets:
            return None
        key, part = (targets[name], None) if isinstance(targets[name], str) else targets[name][:2]
        weight = held[key] if part is None else held[key].narrow(*part)
        return list(weight.shape)

    return {"kind": type(config).__name__, "shapes": {name: shape(name) for name in question["names"]}}


if __name__ == "__main__":
    main()
