"""The adapter while it is trained, and LoRA files: written, installed, checked, described."""
