"""Gates in bfloat16 beside the same gates in float32, and how gates start."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engram_store.errors import ConfigError
from engram_store_client.gates import Gate, GateConfig, GateInit, GateKind, build_gate
from engram_store_client.gates.parts import signed_sqrt_sigmoid

ROUNDING = 2.0**-9
"""Largest relative error of rounding to bfloat16, which has 8 significant bits."""
CHAIN = 12
"""Roundings on the longest way from rows to residual: two projections, two norms and their
weights, product, sum, root, sigmoid, gating, convolution."""


def pair(kind: GateKind) -> tuple[Gate, Gate, Tensor, Tensor]:
    """A gate in float32 whose weights are bfloat16 numbers, its twin in bfloat16, and inputs."""
    generator = torch.Generator().manual_seed(2)
    streams = 1 if kind in (GateKind.ENGRAM, GateKind.ENGRAM_PEFT) else 2
    config = GateConfig(kind=kind, hidden_size=64, row_width=48, streams=streams)
    exact, rounded = build_gate(config), build_gate(config).bfloat16()
    with torch.no_grad():
        for parameter in exact.parameters():
            spread = 1 / math.sqrt(parameter.shape[-1])
            value = spread * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value.bfloat16())
    rounded.load_state_dict(exact.state_dict())
    rows = torch.randn(2, 17, 48, generator=generator).bfloat16()
    shape = (2, 17, 64) if streams == 1 else (2, 17, streams, 64)
    return exact, rounded, rows, torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("kind", GateKind)
def test_bfloat16_gates_are_as_exact_as_their_number_format(kind: GateKind) -> None:
    """Roundings of a chain are independent, so in the mean they add up as their squares do.

    A single value may have them all in one direction.
    """
    exact, rounded, rows, hidden = pair(kind)

    wanted = exact(rows.float(), hidden.float())
    found = rounded(rows, hidden).float()

    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < math.sqrt(CHAIN) * ROUNDING
    assert (found - wanted).abs().max() < CHAIN * ROUNDING * wanted.abs().max()


@pytest.mark.parametrize("kind", GateKind)
def test_bfloat16_gradients_point_the_same_way(kind: GateKind) -> None:
    """Of rows and of every parameter: finite, and at a small angle to those in float32.

    One minus the cosine of an angle is half its square, and the angle the relative error. It is
    larger for what reaches the loss only through the root of the score: its slope grows without
    bound towards a score of zero, so a few tokens decide. In recipes A and P the norms' epsilon,
    bfloat16's own 2**-7 there, adds to that.
    """
    exact, rounded, rows, hidden = pair(kind)
    gradients: list[dict[str, Tensor]] = []
    for gate, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        leaf = rows.to(dtype).requires_grad_()
        (gate(leaf, hidden.to(dtype)).float() * _direction(hidden)).sum().backward()
        named = {n: p.grad for n, p in gate.named_parameters() if p.grad is not None}
        assert leaf.grad is not None
        gradients.append({**named, "rows": leaf.grad})

    wanted, found = gradients
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        ours = found[name].float()
        assert torch.isfinite(ours).all()
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(), gradient.flatten(), dim=0)
        through_root = "key" in name or "query" in name
        angle = 0.25 if through_root else math.sqrt(CHAIN) * 2 * ROUNDING
        assert 1 - cosine < angle**2 / 2, name


def _direction(hidden: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(hidden.shape, generator=generator)


def test_the_activation_stays_finite_where_its_root_is_steep() -> None:
    """At zero, at the smallest and the largest bfloat16 numbers; with gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        score = torch.tensor([0.0, -0.0, tiny, -tiny, 1e-6, huge, -huge], dtype=dtype)
        for zero_is_positive in (False, True):
            leaf = score.clone().requires_grad_()
            gate = signed_sqrt_sigmoid(leaf, zero_is_positive=zero_is_positive)
            gate.sum().backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad).all()
            assert ((gate >= 0) & (gate <= 1)).all()


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize("init", GateInit)
@pytest.mark.parametrize("identity", [False, True])
def test_gates_start_as_published(kind: GateKind, init: GateInit, *, identity: bool) -> None:
    """The convolution at zero but in the demo; projections as torch has them but in Qwen's;
    exactly nothing is added with `identity_init`, whatever the rest."""
    torch.manual_seed(0)
    config = GateConfig(kind=kind, hidden_size=64, row_width=48, init=init, identity_init=identity)
    gate = build_gate(config)
    tensors = gate.state_dict()

    if (convolution := tensors.get("conv.weight")) is not None:
        bound = 1 / math.sqrt(convolution.shape[-1]) if init is GateInit.DEMO else 0.0
        assert convolution.abs().max() <= bound
        assert bool(convolution.any()) == (init is GateInit.DEMO)
    key = tensors["key_value.weight" if kind is GateKind.DEEPSEEK_V41 else "gated.key.weight"][:64]
    uniform = 1 / math.sqrt(48) / math.sqrt(3)
    wanted = 0.02 if init is GateInit.QWEN_PLE else uniform
    assert key.std().item() == pytest.approx(wanted, rel=0.05)
    hidden = torch.randn(1, 5, 1, 64)
    assert bool(gate(torch.randn(1, 5, 48), hidden).any()) != identity


def test_an_unknown_start_is_refused_and_a_known_one_survives_json() -> None:
    """Names work as well as members."""
    shape: dict[str, Any] = {"hidden_size": 4, "row_width": 4}
    config = GateConfig(**shape | {"init": "demo"})

    assert config.init is GateInit.DEMO
    assert GateConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="paper, demo, qwen"):
        GateConfig(**shape | {"init": "zeros"})
