"""`pcm`, the command line: a file of verbs each; every verb imports what it uses when it runs."""
