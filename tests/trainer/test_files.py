"""Files that the trainer writes: whole, and readable as any new file is."""

import os

import pytest
import torch

from phased_consistency.trainer.system.files import write_tensors, write_text


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_have_the_umasks_permissions(tmp_path):
    """safetensors makes its files readable for their owner alone, so that no web server or NAS may hand them out."""
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "lora.safetensors", {"a": torch.zeros(2)}, {})
        write_text(tmp_path / "report.html", "<p>")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("lora.safetensors", "report.html")] == [0o640, 0o640]
