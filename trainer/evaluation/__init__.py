"""The worth of a LoRA: its few-step pictures beside the teacher's many-step ones, from the same prompts and noise.

contestants.py finds the LoRAs, their settings and the prompts; trial.py makes the pictures; metrics.py and
guidance.py measure them, features.py says in what space; report.py, markdown.py and plots.py write it down.
"""
