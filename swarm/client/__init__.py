"""The client side of the swarm: it finds servers and runs sessions through them.

This file imports nothing: ``import app`` must load neither petals nor hivemind.
"""
