"""The gates: published vectors, and what holds for all of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engram_store.errors import ConfigError, ShapeError
from engram_store_client.conformance import check_gating
from engram_store_client.gates import ConvCarry, Gate, GateConfig, GateKind, build_gate, published

GOLDEN = Path(__file__).parents[2] / "golden"


def make_gate(kind: GateKind, *, identity: bool = False) -> tuple[Gate, Tensor, Tensor]:
    """A gate with random weights, rows [2, 11, 10], hidden states that fit it."""
    torch.manual_seed(1)
    streams = 1 if kind is GateKind.ENGRAM else 3
    config = GateConfig(
        kind=kind, hidden_size=6, row_width=10, streams=streams, identity_init=identity
    )
    gate = build_gate(config)
    if not identity:
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(torch.randn_like(parameter))
    shape = (2, 11, 6) if kind in (GateKind.ENGRAM, GateKind.ENGRAM_PEFT) else (2, 11, 3, 6)
    return gate, torch.randn(2, 11, 10), torch.randn(*shape)


def test_gates_agree_with_every_published_vector() -> None:
    """All tensors of all recipes, gradients included, within 1e-5."""
    results = list(check_gating(GOLDEN))

    assert {r.file for r in results} == {p.name for p in GOLDEN.glob("gating_*.safetensors")}
    assert len(results) >= 21
    assert [r for r in results if not r.passed] == []


def test_a_file_that_cannot_be_read_counts_as_failed(tmp_path: Path) -> None:
    """A broken file of vectors is reported, not skipped."""
    (tmp_path / "gating_broken.safetensors").write_bytes(b"nothing")

    (result,) = check_gating(tmp_path)

    assert not result.passed
    assert result.file == "gating_broken.safetensors"


@pytest.mark.parametrize("kind", GateKind)
def test_identity_init_adds_exactly_zero(kind: GateKind) -> None:
    """A fresh gate changes no bit of the hidden states, but learns from its first gradient."""
    gate, rows, hidden = make_gate(kind, identity=True)

    residual = gate(rows, hidden)
    (residual - 1).square().sum().backward()

    assert torch.equal(hidden + residual, hidden)
    assert any(p.grad is not None and bool(p.grad.any()) for p in gate.parameters())


@pytest.mark.parametrize("kind", GateKind)
def test_paper_init_has_a_zero_convolution_and_a_random_value(kind: GateKind) -> None:
    """Without `identity_init` only the convolution starts at zero."""
    gate = build_gate(
        GateConfig(kind=kind, hidden_size=4, row_width=4, streams=2, identity_init=False)
    )

    assert not any(p.any() for name, p in gate.named_parameters() if name == "conv.weight")
    assert gate(torch.randn(1, 3, 4), torch.randn(1, 3, 2, 4)).any()


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 4), (9, 10)])
def test_chunks_with_a_carry_equal_one_pass(kind: GateKind, cuts: tuple[int, ...]) -> None:
    """Wherever a sequence is cut, also in pieces shorter than the convolution's reach."""
    gate, rows, hidden = make_gate(kind)
    carry = ConvCarry()

    whole = gate(rows, hidden)
    parts = [
        gate(r, h, carry=carry)
        for r, h in zip(
            rows.tensor_split(cuts, dim=1), hidden.tensor_split(cuts, dim=1), strict=True
        )
    ]

    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", GateKind)
def test_masked_positions_on_the_left_do_not_reach_later_ones(kind: GateKind) -> None:
    """Left padding under a mask gives the same as no padding, whatever the pads' rows are."""
    gate, rows, hidden = make_gate(kind)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[:, :4] = 0

    padded = gate(rows, hidden, mask=mask)

    torch.testing.assert_close(padded[:, 4:], gate(rows[:, 4:], hidden[:, 4:]))


def test_a_carry_follows_its_sequences_when_they_are_reordered() -> None:
    """Beam search permutes a batch between chunks."""
    gate, rows, hidden = make_gate(GateKind.ENGRAM)
    swap, carry = torch.tensor([1, 0]), ConvCarry()

    gate(rows[:, :5], hidden[:, :5], carry=carry)
    carry.select(swap)
    rest = gate(rows[swap, 5:], hidden[swap, 5:], carry=carry)

    torch.testing.assert_close(rest, gate(rows, hidden)[swap, 5:])


def test_engram_without_convolution_is_the_gated_value() -> None:
    """`conv=False` leaves the gate and nothing else."""
    config = GateConfig(hidden_size=4, row_width=4, conv=False, identity_init=False)
    gate = build_gate(config)
    rows, hidden = torch.randn(1, 5, 4), torch.randn(1, 5, 4)

    assert "conv.weight" not in gate.state_dict()
    torch.testing.assert_close(gate(rows, hidden)[:, 2:], gate(rows[:, 2:], hidden[:, 2:]))


@pytest.mark.parametrize(
    ("rows", "hidden"),
    [
        ((2, 5, 9), (2, 5, 6)),
        ((2, 5, 10), (2, 4, 6)),
        ((1, 5, 10), (2, 5, 6)),
        ((2, 5, 10), (2, 5, 7)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(rows: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    """Nothing is broadcast by accident."""
    gate, _, _ = make_gate(GateKind.ENGRAM)

    with pytest.raises(ShapeError):
        gate(torch.zeros(rows), torch.zeros(hidden))


def test_a_config_survives_json_and_refuses_what_makes_no_sense() -> None:
    """Checkpoints store the config as JSON."""
    config = GateConfig(kind=GateKind.QWEN_PLE, hidden_size=4, row_width=8, streams=2)

    assert GateConfig.from_json(config.to_json()) == config
    for bad in ({"hidden_size": 0}, {"norm_eps": 0.0}, {"bias": True}):
        with pytest.raises(ConfigError):
            GateConfig.from_json({**config.to_json(), **bad})
    with pytest.raises(ConfigError, match="gate description"):
        GateConfig.from_json({**config.to_json(), "kind": "other"})


def test_published_weights_name_a_missing_tensor() -> None:
    """An incomplete checkpoint is an error that says what is missing."""
    with pytest.raises(ConfigError, match=r"key_projs\.0\.weight"):
        published.from_demo({"value_proj.weight": torch.zeros(1)})
