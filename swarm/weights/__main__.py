"""``python -m swarm.weights``."""

from swarm.weights import main

if __name__ == "__main__":
    main()
