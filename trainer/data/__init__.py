"""The data that the student learns on: captioned pictures, or prompts alone; both end as cached latents.

sources.py names the samples (folders.py, shards.py, prompts.py), buckets.py their sizes. cache.py encodes
them, index.py lists what is there, store.py reads it. held_out.py and order.py decide which samples training
sees, and when.
"""
