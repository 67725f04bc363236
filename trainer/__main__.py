"""`python -m phased_consistency.trainer`, the same as `pcm`."""

from .cli.main import main

main()
