"""The clocks of a swarm's machines. Records of the DHT end at a time of day, so all must agree on what time it is."""

import re

from swarm.errors import ClockOff

# What hivemind says when it joins a swarm.
REFUSAL = re.compile(r"local time must be within ([\d.]+) seconds +of others ?\(local: ([\d.]+), peer: ([\d.]+)\)")


def clock_off(error: BaseException) -> ClockOff | None:
    """Return in words what is wrong if hivemind has refused to join a swarm because of the clock."""
    if (found := REFUSAL.search(str(error))) is None:
        return None
    limit, own, others = map(float, found.groups())
    return ClockOff(
        f"the clock of this machine is {abs(own - others):.0f} s {'ahead of' if own > others else 'behind'} that of a "
        f"peer of the swarm, where {limit:g} s are allowed: set it right, for instance by NTP"
    )
