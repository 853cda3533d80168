"""``python -m swarm.weights``: prepare a model ahead of time."""

import argparse
import os
from pathlib import Path

from swarm.errors import ModelUnavailable
from swarm.weights import BUNDLED_MODELS, Progress, default_cache_dir, locate


def main() -> None:
    """Prepare a model ahead of time and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m swarm.weights", description="Prepare a model's files.")
    default = next(iter(BUNDLED_MODELS))
    parser.add_argument(
        "model", nargs="?", default=default, help="bundled name, directory, GGUF file or hub name (%(default)s)"
    )
    cache_dir = Path(os.environ.get("CACHE_DIR") or default_cache_dir()).expanduser()  # the app's setting of that name
    parser.add_argument("--cache-dir", type=Path, default=cache_dir, help="for prepared models (%(default)s)")
    arguments = parser.parse_args()
    progress = Progress(lambda line: print(line, flush=True))
    try:
        place = locate(arguments.model, cache_dir=arguments.cache_dir, progress=progress)
    except ModelUnavailable as error:
        raise SystemExit(str(error)) from None
    print(f"{arguments.model} is ready: {place}")


if __name__ == "__main__":
    main()
