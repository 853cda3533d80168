"""Everything that comes from a peer is read in this package; each module says in its first line what it reads.

A peer is whoever reaches the swarm. What it sends is checked for size, depth, types, shapes and finiteness before
native or recursive code sees it, with bounds that follow from the session that it is for. Whatever is wrong is
``text.Malformed``: for a client that is a failure of the server which sent it, for a server a refusal to the client.

``swarm.compat`` puts these functions in the place of hivemind's and petals' own, in every process. The package
therefore imports neither it nor petals while it is loaded.
"""

import swarm.lazy_imports  # noqa: F401
