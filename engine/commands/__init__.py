"""One thin module per verb of the command line, imported only when it is asked for: `run(args) -> int`, the exit code.

The arguments are declared in `engine.cli`; the work is done in the room of the house that the verb is about.
"""
