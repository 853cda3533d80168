"""How tokens become text. Nothing here knows of transports, settings or petals."""

import swarm.trimming  # noqa: F401  before Transformers, which all of this imports
