"""The published gates: one module each, the pieces that they share in `parts`."""

from engram_store_client.gates.base import Gate
from engram_store_client.gates.config import GateConfig, GateInit, GateKind
from engram_store_client.gates.deepseek_v41 import DeepSeekV41Gate
from engram_store_client.gates.engram import EngramGate
from engram_store_client.gates.engram_peft import EngramPeftGate
from engram_store_client.gates.parts import ConvCarry
from engram_store_client.gates.qwen_ple import QwenPleGate

__all__ = [
    "ConvCarry",
    "DeepSeekV41Gate",
    "EngramGate",
    "EngramPeftGate",
    "Gate",
    "GateConfig",
    "GateInit",
    "GateKind",
    "QwenPleGate",
    "build_gate",
]

_GATES: dict[GateKind, type[Gate]] = {
    GateKind.ENGRAM: EngramGate,
    GateKind.ENGRAM_PEFT: EngramPeftGate,
    GateKind.DEEPSEEK_V41: DeepSeekV41Gate,
    GateKind.QWEN_PLE: QwenPleGate,
}


def build_gate(config: GateConfig) -> Gate:
    """Make the gate that `config` describes, freshly initialised."""
    return _GATES[config.kind](config)
