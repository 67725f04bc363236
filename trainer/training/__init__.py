"""One run of `pcm train`: what it is made of, its loop, and what it leaves."""
