"""`pcm bench-gpu`: every promise that is made of a GPU, in one run within a time limit.

check.py runs the sections in their order and writes the report after each; right.py holds those on what is computed,
fast.py on how fast, small.py on how little memory. section.py is what they are given and give back, bases.py makes the
bases of full size that need no files.
"""
