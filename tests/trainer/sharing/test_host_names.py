"""Names that `pcm convert` writes and the trainer does not, SD3's in kohya's style: ComfyUI maps them all."""

import json
import subprocess

import pytest
import torch

from host.server import HERE, environment, hosts, python_of
from phased_consistency.samplers.lora_file import split_key
from phased_consistency.trainer.families.sd3 import SD3
from phased_consistency.trainer.sharing.names import kohya_name
from phased_consistency.trainer.tiny.single_file import sd3_transformer


@pytest.mark.host
@pytest.mark.skipif(not hosts(), reason="no ComfyUI found: set COMFYUI_PATH to its folder")
@pytest.mark.parametrize("folder", hosts() or [None], ids=lambda path: path.parent.name if path else "none")
@pytest.mark.parametrize(("size", "count"), [("sd3", 340), ("sd35-medium", 392), ("sd35-large", 536)])
def test_the_host_maps_every_sd3_module_by_kohyas_names(folder, size, count):
    """To a weight, or rows of a fused one, of the module's own shape."""
    with torch.device("meta"):
        network = SD3.network_class.from_config(
            SD3.network_class.load_config(SD3.configs.parent / size / "transformer")
        )
    named = {n: m for n, m in network.named_modules() if f".{n}".endswith(tuple(f".{t}" for t in SD3.lora_targets))}
    ours = {kohya_name(f"transformer.{n}", SD3): list(m.weight.shape) for n, m in named.items()}
    assert len(ours) == count and all(split_key(f"{name}.alpha") == (name, "alpha") for name in ours)
    weights = {name: tuple(weight.shape) for name, weight in sd3_transformer(network.state_dict()).items()}
    question = json.dumps({"weights": weights, "names": list(ours)})
    command = [python_of(folder), str(HERE / "lora_targets.py"), str(folder)]
    options = {"capture_output": True, "text": True, "timeout": 240, "cwd": folder, "env": environment()}
    run = subprocess.run(command, input=question, **options)
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = json.loads(run.stdout)["shapes"]
    flat = lambda shape: shape and (shape[0], torch.Size(shape[1:]).numel())  # noqa: E731
    assert {name: flat(shape) for name, shape in theirs.items()} == {name: flat(shape) for name, shape in ours.items()}
