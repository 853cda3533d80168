"""What servers of this project announce. Import this, and with it petals, only after ``swarm.compat``."""

import dataclasses

import pydantic
from petals.data_structures import ServerInfo


@pydantic.dataclasses.dataclass
class AnnouncedInfo(ServerInfo):
    """Petals' ``ServerInfo`` and what petals does not read. Its own servers leave it out."""

    longest_session: int | None = None  # tokens
    pushing: bool = False  # whether its sessions take and make pushes, see ``swarm.wire.pushes``


def extended(info: ServerInfo, longest_session: int, pushing: bool = False) -> AnnouncedInfo:
    """Return what a server of petals announces, and what its sessions can do."""
    fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    return AnnouncedInfo(**fields, longest_session=longest_session, pushing=pushing)
