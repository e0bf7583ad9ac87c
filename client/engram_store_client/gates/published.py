"""Weights under the names of a publication, as the state of our gates.

Each function maps tensors to a state dict for `load_state_dict`; tensors that belong to the
table or the hash are ignored. Raises: ConfigError when a tensor is missing.
"""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from engram_store.errors import ConfigError

Weights: TypeAlias = Mapping[str, Tensor]
State: TypeAlias = dict[str, Tensor]


def from_demo(weights: Weights) -> State:
    """The official demo's module: one projection and one norm per stream."""
    state = {
        "gated.key.weight": _rows_of(weights, "key_projs.{}.weight"),
        "gated.value.weight": _get(weights, "value_proj.weight"),
        "gated.key_norm.weight": _stacked(weights, "norm1.{}.weight"),
        "gated.query_norm.weight": _stacked(weights, "norm2.{}.weight"),
        "conv.norm.weight": _stacked(weights, "short_conv.norms.{}.weight"),
        "conv.weight": _get(weights, "short_conv.conv.weight"),
    }
    if "value_proj.bias" in weights:
        state["gated.key.linear_bias"] = _rows_of(weights, "key_projs.{}.bias")
        state["gated.value.linear_bias"] = weights["value_proj.bias"]
    return state


def from_single_stream(weights: Weights) -> State:
    """Ports of the demo to models with one residual stream."""
    return from_demo(
        {
            "key_projs.0.weight": _get(weights, "key_proj.weight"),
            "key_projs.0.bias": _get(weights, "key_proj.bias"),
            "value_proj.weight": _get(weights, "value_proj.weight"),
            "value_proj.bias": _get(weights, "value_proj.bias"),
            "norm1.0.weight": _get(weights, "norm1.weight"),
            "norm2.0.weight": _get(weights, "norm2.weight"),
            "short_conv.norms.0.weight": _get(weights, "short_conv.norm.weight"),
            "short_conv.conv.weight": _get(weights, "short_conv.conv.weight"),
        }
    )


def from_engram_peft(weights: Weights) -> State:
    """One layer of an engram-peft adapter."""
    return {
        "gated.key.weight": _rows_of(weights, "gating.w_k.{}.weight"),
        "gated.value.weight": _get(weights, "gating.w_v.weight"),
        "gated.key_norm.weight": _stacked(weights, "gating.norm_k.{}.weight"),
        "gated.query_norm.weight": _stacked(weights, "gating.norm_h.{}.weight"),
        "conv.norm.weight": _stacked(weights, "short_conv.norms.{}.weight"),
        "conv.weight": _get(weights, "short_conv.conv.weight"),
    }


def from_deepseek_v41(weights: Weights) -> State:
    """`layers.{n}.engram.*` of a DeepSeek-V4.1 checkpoint, dequantised."""
    return {
        "key_value.weight": _get(weights, "wkv"),
        "query_weight": _get(weights, "q_weight"),
        "key_weight": _get(weights, "k_weight"),
    }


def from_qwen_ple(weights: Weights) -> State:
    """`layers.{n}.ple.*` of a `qwen4_exp` checkpoint."""
    value = _get(weights, "value_proj.weight")
    per_stream = (-1, value.shape[0])
    return {
        "gated.key.weight": _get(weights, "key_proj.weight"),
        "gated.value.weight": value,
        "gated.key_norm.weight": _get(weights, "norm_key.weight").reshape(per_stream),
        "gated.query_norm.weight": _get(weights, "norm_query.weight").reshape(per_stream),
        "conv.norm.weight": _get(weights, "norm_conv.weight").reshape(per_stream),
        "conv.weight": _get(weights, "conv1d.weight"),
    }


def _get(weights: Weights, name: str) -> Tensor:
    try:
        return weights[name]
    except KeyError:
        raise ConfigError(f"no tensor {name!r} among {sorted(weights)}") from None


def _numbered(weights: Weights, pattern: str) -> Iterator[Tensor]:
    """The tensors of stream 0, 1, 2, ... while there are any."""
    yield _get(weights, pattern.format(0))
    stream = 1
    while (name := pattern.format(stream)) in weights:
        yield weights[name]
        stream += 1


def _rows_of(weights: Weights, pattern: str) -> Tensor:
    return torch.cat(list(_numbered(weights, pattern)))


def _stacked(weights: Weights, pattern: str) -> Tensor:
    return torch.stack(list(_numbered(weights, pattern)))
