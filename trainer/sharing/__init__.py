"""LoRA files for others: converted, tagged, merged, resized, taken out of two checkpoints, with sidecars."""
