"""Run by a host's own Python: what that host's loader does with LoRA files, against what they are meant to add.

python lora_effect.py HOST_FOLDER < [{"weights": FILE, "loras": [[LORA, MEANT], ...]}, ...] > [[{...}, ...], ...]

weights: of a network, under the host's names. MEANT: a file of what is to be added to each.
"""

import json
import logging
import sys
from collections.abc import Iterator


class Unmatched(logging.Handler):
    """Counts the tensors of which the host says that it did not load them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        if "lora key not loaded" in record.getMessage():
            self.names.append(record.getMessage().split()[-1])


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    requests = json.load(sys.stdin)
    answer, sys.stdout = sys.stdout, sys.stderr  # the host prints
    from comfy.cli_args import args

    args.cpu = True
    json.dump([list(effects(**each)) for each in requests], answer)


def effects(weights: str, loras: list[list[str]]) -> Iterator[dict]:
    """For each LoRA: tensors unmatched, |added - meant| / |meant| over all weights, and the greatest difference."""
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.sd
    import torch
    from comfy.utils import load_torch_file

    tensors, cpu = load_torch_file(weights), torch.device("cpu")
    config = comfy.model_detection.model_config_from_unet(tensors, "")
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(tensors, "", device=cpu)
    model.load_model_weights(tensors, "")
    bare = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    for lora, meant in loras:
        logging.getLogger().addHandler(said := Unmatched())
        patched, _ = comfy.sd.load_lora_for_models(bare, None, load_torch_file(lora), 1.0, 0.0)
        logging.getLogger().removeHandler(said)
        deltas = {f"diffusion_model.{name}": delta for name, delta in load_torch_file(meant).items()}
        size = sum(delta.double().square().sum().item() for delta in deltas.values())
        patched.patch_model()
        off = [(now - (before[key] + deltas.pop(key, 0))).double() for key, now in model.state_dict().items()]
        patched.unpatch_model()
        assert not deltas, f"not in this host's model: {list(deltas)[:3]}"
        wrong = sum(x.square().sum().item() for x in off)
        greatest = max(x.abs().max().item() for x in off if x.numel())
        yield {"unmatched": said.names, "error": (wrong / size) ** 0.5, "difference": greatest}


if __name__ == "__main__":
    main()
