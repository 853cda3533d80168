"""Reads everything that comes from a peer; the first line of each module says what it reads.

A peer is anybody who can reach the swarm. Its data is checked for size, depth, types, shapes and finiteness before
native or recursive code sees it, with bounds that follow from its session. Any fault raises ``text.Malformed``: a
client treats it as a failure of the server that sent the data, a server refuses the client's request.

``swarm.compat`` replaces hivemind's and petals' own functions by these, in every process. While it is loaded, the
package therefore imports neither ``swarm.compat`` nor petals.
"""

import swarm.lazy_imports  # noqa: F401
