"""``python -m swarm.server``. Whoever has started it is told why it fails, also if that is while the program loads."""

import sys

from swarm.lifeline import program_line
from swarm.options import parse_args


def start() -> int:
    """Run a server; return the exit status."""
    if parse_args().end_with_parent:
        program_line.hold()
    try:
        from swarm.server.serve import main

        return main()
    except Exception as error:
        program_line.say_failed(error)
        raise


if __name__ == "__main__":
    sys.exit(start())
