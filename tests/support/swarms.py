"""What servers say of themselves, asked directly."""

from typing import Any

from hivemind import MSGPackSerializer
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from petals.server.handler import TransformerConnectionHandler

from swarm.client.model import SwarmModel
from swarm.client.routing import ServerView

ANSWER_TIMEOUT = 3.0  # seconds; on loopback a living server answers within milliseconds


def server_info(model: SwarmModel, view: ServerView) -> dict[str, Any] | None:
    """Return a server's ``rpc_info``, its counts among it; None if it does not answer."""
    stub = TransformerConnectionHandler.get_stub(model.state.manager.state.p2p, PeerID.from_base58(view.peer_id))
    uid = runtime_pb2.ExpertUID(uid=model.state.manager.block_uids[view.start])
    try:
        reply = RemoteExpertWorker.run_coroutine(stub.rpc_info(uid, timeout=ANSWER_TIMEOUT))
    except (TimeoutError, OSError, EOFError, P2PDaemonError, P2PHandlerError, ControlFailure):
        return None
    return MSGPackSerializer.loads(reply.serialized_info)


def all_answer(model: SwarmModel, count: int | None = None) -> bool:
    """Whether all servers of a model that are announced answer.

    :param count: how many there must be; None: any number
    """
    views = model.state.servers()
    return count in (None, len(views)) and all(server_info(model, view) for view in views)
