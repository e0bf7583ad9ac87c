"""The ranks of a data-parallel training as one trainer of a store."""

import secrets
from typing import Any

import torch.distributed


def rank_options() -> dict[str, Any]:
    """Options of `connect` for a rank of torch.distributed: who it is, and the name of the job.

    A call of all ranks, after `init_process_group` (Accelerate and the Trainer of transformers make
    the group too). Where there is no group, or one of a single rank, the session is an ordinary
    one, so a script needs no second way for one process:

        session = connect("unix:/run/engram/store.sock", **rank_options())

    Returns:
        `job` (new for every call: ranks of an earlier run that still live are not mistaken for
        these), `rank` and `world_size` of `engram_store_client.remote.RemoteOptions`; empty
        without a group.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    world_size = distributed.get_world_size()
    if world_size == 1:
        return {}
    named: list[str] = [secrets.token_hex(16)]
    distributed.broadcast_object_list(named, src=0)
    return {"job": named[0], "rank": distributed.get_rank(), "world_size": world_size}
