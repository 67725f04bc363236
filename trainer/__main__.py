"""`python -m phased_consistency.trainer`, the same as `pcm`."""

from .cli import main

main()
