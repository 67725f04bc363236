"""Run by a host's own Python: what shape of weight that host means by each LoRA name, in a model without weights.

python lora_targets.py HOST_FOLDER < {"weights": {name: shape}, "names": [...]} > {"kind": ..., "shapes": {...}}
"""

import json
import sys


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    request = json.load(sys.stdin)
    answer, sys.stdout = sys.stdout, sys.stderr  # the host prints
    from comfy.cli_args import args

    args.cpu = True
    import comfy.lora
    import comfy.model_detection
    import torch

    weights = {name: torch.empty(shape, device="meta") for name, shape in request["weights"].items()}
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

    json.dump({"kind": type(config).__name__, "shapes": {name: shape(name) for name in request["names"]}}, answer)


if __name__ == "__main__":
    main()
