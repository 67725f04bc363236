"""`pcm`, the command line: a file of verbs each; every verb imports what it uses when it runs."""

# `pip install phased-consistency` brings none of what the verbs need: in ComfyUI the pack needs nothing but the host.
INSTALL = 'pip install "phased-consistency[train]" (in a checkout: pip install -e ".[train]")'
