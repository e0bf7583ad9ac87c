"""Compares the gates with vectors that the published code produced.

The core's conformance check finds `check_gating` by the entry point group
`engram_store.conformance`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram_store.conformance import Comparison
from engram_store_client.gates import EngramGate, Gate, GateConfig, GateKind, build_gate, published

ATOL = RTOL = 1e-5
"""fp32 results of two correct implementations differ in the order of their sums."""


@dataclass(frozen=True, slots=True)
class _Vectors:
    """One file of vectors."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The module's weights, under their published names."""
        return {n.removeprefix("w."): t for n, t in self.tensors.items() if n.startswith("w.")}

    def number(self, name: str, default: int) -> int:
        """An integer of the metadata."""
        return int(self.metadata.get(name, default))


_Results = Iterator[tuple[str, Tensor, Tensor]]
"""(name of the expected tensor, what we computed, what was expected)."""


def check_gating(directory: Path) -> Iterator[Comparison]:
    """Compare every `gating_*.safetensors` in a directory, tensor by tensor.

    The file's metadata names its recipe and shapes. A file that cannot be used counts as
    failed, with the reason as its detail.
    """
    for path in sorted(directory.glob("gating_*.safetensors")):
        report = partial(Comparison, kind="gating", file=path.name)
        try:
            vectors = _read(path)
            for what, ours, expected in _RECIPES[vectors.metadata["recipe"]](vectors):
                passed, detail = _compare(ours, expected)
                yield report(what=what, passed=passed, detail=detail)
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            yield report(what="file", passed=False, detail=f"{type(error).__name__}: {error}")


def _read(path: Path) -> _Vectors:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return _Vectors(file.metadata() or {}, {name: file.get_tensor(name) for name in names})


def _compare(ours: Tensor, expected: Tensor) -> tuple[bool, str]:
    if ours.shape != expected.shape:
        return False, f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    error = (ours - expected).abs().max().item()
    return torch.allclose(ours, expected, ATOL, RTOL), f"max abs error {error:.1e}"


def _gate(config: GateConfig, state: Mapping[str, Tensor]) -> Gate:
    gate = build_gate(config)
    gate.load_state_dict(state)
    return gate


def _demo(vectors: _Vectors) -> _Results:
    """The official demo, with gradients."""
    rows = vectors["in.embeddings"].clone().requires_grad_()
    hidden = vectors["in.hidden_states"].clone().requires_grad_()
    config = GateConfig(
        hidden_size=hidden.shape[-1],
        row_width=rows.shape[-1],
        streams=hidden.shape[2],
        bias="value_proj.bias" in vectors.weights,
        kernel_size=vectors.number("kernel_size", 4),
        dilation=vectors.number("dilation", 3),
    )
    gate = EngramGate(config)
    gate.load_state_dict(published.from_demo(vectors.weights))
    out = gate(rows, hidden)
    out.backward(vectors["grad.upstream"])
    parameters = dict(gate.named_parameters())
    yield "out.gates", gate.gated.gates(rows, hidden), vectors["out.gates"]
    yield "out.engram_output", out, vectors["out.engram_output"]
    for name, leaf in {
        "grad.embeddings": rows,
        "grad.hidden_states": hidden,
        "grad.value_proj.weight": parameters["gated.value.weight"],
        "grad.short_conv.conv.weight": parameters["conv.weight"],
    }.items():
        yield name, _gradient(leaf), vectors[name]


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _single_stream(vectors: _Vectors) -> _Results:
    """The demo's module on a model with one residual stream."""
    rows, hidden = vectors["in.embeddings"], vectors["in.hidden_states"]
    config = GateConfig(
        hidden_size=hidden.shape[-1],
        row_width=rows.shape[-1],
        bias=True,
        kernel_size=vectors.number("kernel_size", 4),
        dilation=vectors.number("dilation", 3),
    )
    gate = _gate(config, published.from_single_stream(vectors.weights))
    yield "out.engram_output", gate(rows, hidden), vectors["out.engram_output"]


def _engram_peft(vectors: _Vectors) -> _Results:
    """engram-peft: rows come from its own table; its output includes the residual add."""
    weights, hidden = vectors.weights, vectors["in.hidden_states"]
    ids = vectors["in.hash_indices"] + weights["multi_head_embedding.offsets"]
    rows = weights["multi_head_embedding.embedding.weight"][ids].flatten(-2)
    config = GateConfig(
        kind=GateKind.ENGRAM_PEFT,
        hidden_size=hidden.shape[-1],
        row_width=rows.shape[-1],
        streams=vectors.number("hc_mult", 1),
        kernel_size=weights["short_conv.conv.weight"].shape[-1],
        dilation=vectors.number("dilation", 3),
    )
    gate = _gate(config, published.from_engram_peft(weights))
    yield "out.hidden_states", hidden + gate(rows, hidden), vectors["out.hidden_states"]


def _deepseek(vectors: _Vectors) -> _Results:
    """DeepSeek-V4.1: single sequences, the residual add included."""
    rows, hidden = vectors["in.rows"].unsqueeze(0), vectors["in.x"].unsqueeze(0)
    config = GateConfig(
        kind=GateKind.DEEPSEEK_V41,
        hidden_size=hidden.shape[-1],
        row_width=rows.shape[-1],
        streams=hidden.shape[2],
        norm_eps=float(vectors.metadata["eps"]),
    )
    gate = _gate(config, published.from_deepseek_v41(vectors.weights))
    text = (vectors["in.input_ids"] != 3).unsqueeze(0)
    yield "mid.kv", gate.get_submodule("key_value")(rows)[0], vectors["mid.kv"]
    yield "out.hidden", (hidden + gate(rows, hidden))[0], vectors["out.hidden"]
    without_images = (hidden + gate(rows, hidden, mask=text))[0]
    yield "out.hidden_image_id_3", without_images, vectors["out.hidden_image_id_3"]


def _qwen_ple(vectors: _Vectors) -> _Results:
    """Qwen's PLE, once plain and once with a left-padded batch."""
    settings = json.loads(vectors.metadata["config"])
    streams, size = settings["hc_count"], settings["hidden_size"]
    hidden = vectors["in.hidden_states"]
    hidden = hidden.view(*hidden.shape[:2], streams, size)
    weights = vectors.weights
    config = GateConfig(
        kind=GateKind.QWEN_PLE,
        hidden_size=size,
        row_width=settings["ple_embed_dim"],
        streams=streams,
        kernel_size=weights["conv1d.weight"].shape[-1],
        dilation=settings["ngram_size"],
    )
    gate = _gate(config, published.from_qwen_ple(weights))
    eos, mask = settings["eos_token_id"], vectors["in.conv_mask"]
    rows = _ple_rows(weights, vectors["in.input_ids"], eos)
    yield "out.ple", gate(rows, hidden).flatten(-2), vectors["out.ple"]
    rows = _ple_rows(weights, vectors["in.input_ids_masked"].where(mask.bool(), eos), eos)
    masked = gate(rows, hidden, mask=mask).flatten(-2)
    yield "out.ple_masked", masked, vectors["out.ple_masked"]


def _ple_rows(weights: Mapping[str, Tensor], ids: Tensor, eos: int) -> Tensor:
    """Rows [B, T, E] of a `qwen4_exp` table for ids [B, T].

    Source: transformers 5.23.0. Looking back to or past an end of sequence yields it; heads
    come in equal groups, one n-gram order after the other, from bigrams on.
    """
    sizes = weights["ple_embedding.ngram_heads_vocab_sizes"]
    offsets = weights["ple_embedding.ngram_heads_offsets"]
    multipliers = weights["ple_embedding.layer_multipliers"]
    heads = len(sizes) // (len(multipliers) - 1)
    mix = ids * multipliers[0]
    ended = torch.zeros_like(ids, dtype=torch.bool)
    columns = []
    for back, multiplier in enumerate(multipliers[1:], start=1):
        older = torch.full_like(ids, eos)
        older[:, back:] = ids[:, :-back]
        ended = ended | (older == eos)
        mix = mix ^ (older.masked_fill(ended, eos) * multiplier)
        columns.append(mix.unsqueeze(-1) % sizes[(back - 1) * heads : back * heads])
    table = weights["ple_embedding.ngram_embedding.weight"]
    return table[torch.cat(columns, -1) + offsets].flatten(-2)


_RECIPES: Mapping[str, Callable[[_Vectors], _Results]] = {
    "A": _demo,
    "B": _deepseek,
    "C": _qwen_ple,
    "D": _single_stream,
    "P": _engram_peft,
}
