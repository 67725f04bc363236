"""Pictures from a base and a LoRA: sampled, or edited."""
