"""The side of the swarm that computes: a server of some blocks.

This file imports nothing: the client imports its sibling and must not load this one.
"""
