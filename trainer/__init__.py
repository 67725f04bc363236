"""The trainer, by rooms: docs/architecture.md. Importing any of it keeps the libraries' notices off stderr."""

from .system.quiet import quiet_libraries

# here, before whatever is imported of the trainer imports them: for the command line and for a program of one's own
quiet_libraries()
