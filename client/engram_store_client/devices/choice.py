"""Which streams and which registrar a device has. CUDA's are loaded where there is CUDA."""

import torch

from engram_store_client.devices.registrar import Registrar
from engram_store_client.devices.streams import Streams


def open_streams(device: torch.device) -> Streams | None:
    """Side streams of a device; None: it has none, or rows need no copy (a CPU)."""
    if device.type != "cuda":
        return None
    from engram_store_client.devices.cuda_streams import CudaStreams

    if device == torch.device("cuda"):  # whichever is the current one
        device = torch.device("cuda", torch.cuda.current_device())
    return CudaStreams(device)


def registrar_for(device: torch.device) -> tuple[Registrar, bool]:
    """Who pins for a CUDA device, and whether that device shares the host's memory."""
    from engram_store_client.devices.cuda_registrar import CudaRegistrar, is_integrated

    return CudaRegistrar(device), is_integrated(device)
