"""A session with a store process: the session protocol over one gRPC stream."""

from engram_store_client.remote.options import RemoteOptions
from engram_store_client.remote.session import RemoteSession

__all__ = ["RemoteOptions", "RemoteSession"]
