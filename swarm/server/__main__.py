"""``python -m swarm.server``. Whoever has started it is told why it fails, also if that is while the program loads."""

import sys

from swarm import collector, places
from swarm.lifeline import program_line
from swarm.options import parse_args
from swarm.places import PlaceUnusable


def start() -> int:
    """Run a server; return the exit status."""
    options = parse_args()
    if options.end_with_parent:
        program_line.hold()
    try:
        places.settle_temporary_files()
        places.settle_home(options.cache_dir)
        cache_dir = options.cache_dir or places.default_cache_dir()
        places.settle_petals(cache_dir)
        places.settle_compiled(cache_dir)
        with collector.paused():
            from swarm.server.serve import main

        return main()
    except PlaceUnusable as error:
        print(error, file=sys.stderr)
        program_line.say_failed(str(error))
        return 1
    except Exception as error:
        program_line.say_failed(error)
        raise


if __name__ == "__main__":
    sys.exit(start())
