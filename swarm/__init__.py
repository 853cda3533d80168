"""The swarm: servers that hold a model's blocks, and the client that computes with them. Nothing here knows of HTTP."""
