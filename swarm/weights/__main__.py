"""``python -m swarm.weights``: prepare a model ahead of time."""

import argparse
import os
from pathlib import Path

from swarm.errors import ModelUnavailable
from swarm.places import PlaceUnusable, named_cache_dir
from swarm.weights import BUNDLED_MODELS, Progress, locate


def main() -> None:
    """Prepare a model ahead of time and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m swarm.weights", description="Prepare a model's files.")
    default = next(iter(BUNDLED_MODELS))
    parser.add_argument(
        "model", nargs="?", default=default, help="bundled name, directory, GGUF file or hub name (%(default)s)"
    )
    parser.add_argument("--cache-dir", type=Path, help="for prepared models (CACHE_DIR, or the user's cache directory)")
    arguments = parser.parse_args()
    progress = Progress(lambda line: print(line, flush=True))
    try:
        # The app's setting of that name.
        cache_dir = arguments.cache_dir or named_cache_dir(os.environ.get("CACHE_DIR", "").strip())
        place = locate(arguments.model, cache_dir=cache_dir, progress=progress)
    except (ModelUnavailable, PlaceUnusable) as error:
        raise SystemExit(str(error)) from None
    print(f"{arguments.model} is ready: {place}")


if __name__ == "__main__":
    main()
