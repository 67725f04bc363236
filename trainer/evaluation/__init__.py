"""What a LoRA is worth: its few-step pictures beside the teacher's many-step ones, from the same prompts and noise.

trial.py makes the pictures, metrics.py and guidance.py measure them, features.py says in what space, report.py and
plots.py write it down.
"""
