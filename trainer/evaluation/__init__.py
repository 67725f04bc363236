"""The worth of a LoRA: its few-step pictures beside the teacher's many-step ones, of the same prompts.

contestants.py finds the LoRAs, their settings and the prompts; trial.py makes the pictures, judge.py looks at them,
features.py says in what space. gauge.py measures a setting: picture by picture (metrics.py) and as sets (distances.py),
each figure with its interval (intervals.py); guidance.py what CFG does. contest.py has all settings of a report, and
report.py, markdown.py and plots.py write it down.
"""
