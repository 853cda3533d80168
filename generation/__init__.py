"""How tokens become text. Nothing here knows of transports, settings or petals."""
