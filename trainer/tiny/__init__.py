"""Tiny bases that ship with the pack, the pictures and prompts they know, and the scripts that made them."""
