"""Measurements that fill docs/measurements/, each a script.

matrix.py: the settings of PCM. family.py: PCM beside its relatives. isolation.py: the run of drawn digits. style.py: a
fine-tuning. emoji.py: the base that draws emoji. editing.py: the edits, with edit_baselines.py, edit_metrics.py and
edit_tables.py.
"""
