"""The report of a run: what came out, how it went, what it cost; one page, from the run folder's files alone.

story.py reads the folder, curves.py draws, page.py and page.html make the page.
"""
