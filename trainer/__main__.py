"""`python -m phased_consistency.trainer`, the same as `pcm`."""

from .cli.start import start

start()
