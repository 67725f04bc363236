"""For the tests of LoRA files: how to write one."""

import pytest
from safetensors.torch import save_file


@pytest.fixture
def write(tmp_path):
    """Write tensors as a LoRA file and return its path."""

    def write(tensors, metadata=None, name="style.safetensors"):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write
