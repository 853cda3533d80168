"""``python -m swarm.server``."""

import sys

from swarm.server.serve import main

if __name__ == "__main__":
    sys.exit(main())
