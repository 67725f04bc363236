"""What stands in a model's place after a download that went wrong is called what it is."""

import pytest

from phased_consistency.samplers.file_kinds import kind_of
from phased_consistency.samplers.lora_file import read_header

AGAIN = r"Download the file itself again\.$"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665f7f1\nsize 3438167536\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", rf"is empty \(0 bytes\)\. {AGAIN}"),
        (LFS, r"is a git-lfs pointer, and no \.safetensors file\. Run git lfs pull, or download the file itself again"),
        (b"<!DOCTYPE html><html><head><title>Sign in", rf"is a web page, .*{AGAIN}"),
        (b"\xef\xbb\xbf\n <HTML lang='en'>", rf"is a web page, .*{AGAIN}"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", rf"is XML, .*{AGAIN}"),
        (b'{"error": "Unauthorized", "message": "log in"}', rf"is JSON, .*{AGAIN}"),
        (b"{}", rf"is JSON, .*{AGAIN}"),
        (b'[\n {"error": 1}]', rf"is JSON, .*{AGAIN}"),
        (b"[base]\npath = 1\n", rf"is a text that begins .*{AGAIN}"),
        (b"Entry not found, try later", rf"is a text that begins 'Entry not found, try later'.*{AGAIN}"),
        (b"GGUF\x03\0\0\0\1\2\3", r"is a GGUF file, whose weights are quantised, .*in 16 bits\.$"),
        (b"PK\x03\x04\0\0\0\0archive/data.pkl", r"is a zip archive or a file of torch\.save, .*: convert it\.$"),
        (b"\x80\x02}q\0X\6\0\0weight", r"is a pickle, .*: convert it\.$"),
        (b"\x1f\x8b\x08\0\0\0\0\0", r"is a packed archive, .*Unpack it first\.$"),
        (b"\x89PNG\r\n\x1a\n\0\0", r"is a picture, "),
        (b"\x01\x02\x03\xff\xff\xff\xff\xff\xff", r"is not a \.safetensors file, the only kind read"),
    ],
)
def test_files_are_called_what_they_are(tmp_path, content, message):
    path = tmp_path / "style.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^style\.safetensors {message}"):
        read_header(path)
    assert kind_of(path)
