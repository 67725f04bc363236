"""`pcm bench`: our loop beside one like the published scripts', on the same work; `pcm bench-data`: a large cache.

comparison.py runs both loops, reference.py is the other one, measure.py holds the instruments, report.py
prints. cache.py measures the cache.

`pcm bench --count`: count.py starts a process in which emulated.py lets torch believe in a CUDA device, full_size.py
makes an update of fake tensors there, and ledger.py notes what it asks of the device.

`pcm bench-gpu`: gpu/.
"""
