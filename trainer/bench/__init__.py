"""`pcm bench`: what our loop and a loop like the published scripts' take for the same work."""
