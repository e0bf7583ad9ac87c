"""The torch side of engram-store: gates, hooks for Hugging Face models, checkpoints.

Names are loaded on first use, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_store_client.adapters import memories, set_active
    from engram_store_client.admin import connect_admin
    from engram_store_client.conformance import check_gating
    from engram_store_client.devices.copies import Transfers
    from engram_store_client.gates import (
        ConvCarry,
        DeepSeekV41Gate,
        EngramGate,
        EngramPeftGate,
        Gate,
        GateConfig,
        GateInit,
        GateKind,
        QwenPleGate,
        build_gate,
    )
    from engram_store_client.huggingface import attach, from_pretrained
    from engram_store_client.memory import Memory
    from engram_store_client.parameters import Mode, ParameterCounts
    from engram_store_client.ranks import rank_options
    from engram_store_client.transport import connect
    from engram_store_client.vocabulary import check_tokenizer
    from engram_store_client.windows import Guards

__all__ = [
    "ConvCarry",
    "DeepSeekV41Gate",
    "EngramGate",
    "EngramPeftGate",
    "Gate",
    "GateConfig",
    "GateInit",
    "GateKind",
    "Guards",
    "Memory",
    "Mode",
    "ParameterCounts",
    "QwenPleGate",
    "Transfers",
    "attach",
    "build_gate",
    "check_gating",
    "check_tokenizer",
    "connect",
    "connect_admin",
    "from_pretrained",
    "memories",
    "rank_options",
    "set_active",
]

_HOMES = {
    "Guards": "windows",
    "Memory": "memory",
    "Transfers": "devices.copies",
    "Mode": "parameters",
    "ParameterCounts": "parameters",
    "attach": "huggingface",
    "check_gating": "conformance",
    "check_tokenizer": "vocabulary",
    "connect": "transport",
    "connect_admin": "admin",
    "from_pretrained": "huggingface",
    "memories": "adapters",
    "rank_options": "ranks",
    "set_active": "adapters",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOMES.get(name, 'gates')}")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return __all__
