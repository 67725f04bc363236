"""`pcm bench`: our loop beside one like the published scripts', on the same work; `pcm bench-data`: a large cache.

comparison.py runs both loops, reference.py is the other one, measure.py holds the instruments, report.py
prints. cache.py measures the cache.
"""
