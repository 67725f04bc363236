"""A run's own account of itself: shown as it goes, written down, and at its end put together on one page.

progress.py is the interface to the user and the progress bar. journal.py passes on all that is written down,
to log.py (log.jsonl) and trackers.py (TensorBoard and others). The page comes from the run folder's files
alone: story.py reads them, curves.py draws, page.py and page.html make the page.
"""
