"""``python -m swarm.server``. Whoever has started it is told why it fails, also if that is while the program loads."""

import sys
from collections.abc import Callable
from pathlib import Path

from swarm import collector, places
from swarm.compiling import load_compiler
from swarm.lifeline import program_line
from swarm.options import parse_args
from swarm.places import PlaceUnusable


def load(cache_dir: Path | None) -> Callable[[], int]:
    """Load the program; return what runs a server by its command line.

    :raises PlaceUnusable: if files cannot be kept where they have to be
    """
    places.settle_temporary_files()
    places.settle_home(cache_dir)
    cache_dir = cache_dir or places.default_cache_dir()
    places.settle_petals(cache_dir)
    places.settle_compiled(cache_dir)
    with collector.paused():
        from swarm.server.serve import main

        load_compiler()
    return main


def start() -> int:
    """Run a server; return the exit status."""
    options = parse_args()
    if options.end_with_parent:
        program_line.hold()
    try:
        return load(options.cache_dir)()
    except PlaceUnusable as error:
        print(error, file=sys.stderr)
        program_line.say_failed(str(error))
        return 1
    except Exception as error:
        program_line.say_failed(error)
        raise


if __name__ == "__main__":
    sys.exit(start())
