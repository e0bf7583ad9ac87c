"""Which parameters are trained beside the tables, and at which rates."""

import pytest
import torch
from torch import nn

from engram_store.errors import ConfigError
from engram_store.types import OptimizerKind
from engram_store_client import Mode, attach
from engram_store_client.rates import TABLE_LR_FACTOR
from tests.unit.client.models import flags, shape_of
from tests.unit.client.tiny import llama, loss_of, make_session, make_tokens, scramble


def half_frozen() -> nn.Module:
    """A llama of which only layer 1 is trained."""
    model = llama().requires_grad_(requires_grad=False)
    model.get_submodule("model.layers.1").requires_grad_(requires_grad=True)
    return model


@pytest.mark.parametrize("mode", Mode)
def test_each_mode_trains_what_it_says_and_detach_restores_what_was_found(mode: Mode) -> None:
    """Gates are trained in all of them."""
    model = half_frozen()
    found = flags(model)

    memory = attach(model, make_session(), mode=str(mode))

    wanted = {
        Mode.ENGRAM_ONLY: dict.fromkeys(found, False),
        Mode.PRESERVE_TRAINABLE: found,
        Mode.FULL: dict.fromkeys(found, True),
    }[mode]
    now = flags(model)
    assert memory.mode is mode
    assert {name: now.pop(name) for name in wanted} == wanted
    assert now
    assert all(now.values())
    loss_of(model, make_tokens()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    memory.detach()
    assert flags(model) == found


def test_a_mode_can_be_changed_without_forgetting_what_was_found() -> None:
    """Each change starts from there."""
    model = half_frozen()
    found = flags(model)
    memory = attach(model, make_session(), mode="full")

    memory.set_mode("preserve_trainable")
    assert {name: flags(model)[name] for name in found} == found
    memory.set_mode(Mode.ENGRAM_ONLY)
    assert not any(flags(model)[name] for name in found)
    with pytest.raises(ConfigError, match="unknown mode"):
        memory.set_mode("some")
    assert memory.mode is Mode.ENGRAM_ONLY
    memory.detach()

    assert flags(model) == found


def test_full_training_of_quantised_weights_is_refused_with_what_would_do() -> None:
    """Weights as bitsandbytes keeps them: bytes. Gates take the format of the norms."""
    model = llama().bfloat16()
    packed = torch.zeros(4, 4, dtype=torch.uint8)
    for layer in model.get_submodule("model.layers").children():
        attention = layer.get_submodule("self_attn")
        weight = nn.Parameter(packed, requires_grad=False)
        attention.register_parameter("aaa_first", weight)
    shape = shape_of(model)

    with pytest.raises(ConfigError, match=r"torch\.uint8.*preserve_trainable"):
        attach(model, make_session(), mode="full")
    assert shape_of(model) == shape
    memory = attach(model, make_session())

    assert {p.dtype for p in memory.gates.parameters()} == {torch.bfloat16}


def test_gates_that_the_user_froze_stay_frozen() -> None:
    """Only an adapter library that came meanwhile is contradicted."""
    model, session = llama(), make_session()
    memory = attach(model, session)
    scramble(memory)
    memory.gates.requires_grad_(requires_grad=False)

    loss_of(model, make_tokens()).backward()
    applied = memory.commit(0, lr=1.0)

    assert not memory.train_gates()
    assert memory.count_parameters().gates_trainable == 0
    assert sum(applied.rows.values()) > 0


def test_parameters_are_counted_with_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed as peft does, with what lies in the store."""
    model, session = half_frozen(), make_session(optimizer=OptimizerKind.ADAGRAD)
    base = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = attach(model, session, mode="preserve_trainable")

    counts = memory.count_parameters()
    memory.print_trainable_parameters()

    gates = sum(p.numel() for p in memory.gates.parameters())
    rows = sum(spec.rows for spec in session.tables.values())
    assert (counts.gates, counts.gates_trainable) == (gates, gates)
    assert (counts.base, counts.base_trainable, counts.adapters) == (base, trained, 0)
    assert (counts.table_rows, counts.table_values) == (rows, 4 * rows)
    assert counts.table_bytes == rows * (16 + 16)
    printed = capsys.readouterr().out
    share = 100 * (gates + trained) / (gates + base)
    assert f"trainable params: {gates + trained:,d} || all params: {gates + base:,d}" in printed
    assert f"trainable%: {share:.4f}" in printed
    assert f"{rows:,d} rows" in printed
    memory.detach()
    control = attach(model, session, zero_table=True, layers=[0])
    assert not control.count_parameters().tables_trained
    assert control.count_parameters().table_rows == session.tables[0].rows


def test_parameter_groups_cover_everything_that_is_trained_once() -> None:
    """With the rates asked for; norms, biases and convolutions do not decay."""
    model = half_frozen()
    memory = attach(model, make_session(), mode="preserve_trainable", bias=True)

    groups = memory.parameter_groups(1e-3, 0.1, gate_lr_factor=2.0)
    torch.optim.AdamW(groups)

    by_name = {group["name"]: group for group in groups}
    inside = [id(p) for group in groups for p in group["params"]]
    assert sorted(inside) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {n: (g["lr"], g["weight_decay"]) for n, g in by_name.items()} == {
        "base": (1e-3, 0.1),
        "base, no decay": (1e-3, 0.0),
        "gates": (2e-3, 0.1),
        "gates, no decay": (2e-3, 0.0),
    }
    decaying = {id(p) for p in by_name["gates"]["params"]}
    for name, parameter in memory.gates.named_parameters():
        linear = name.endswith(("key.weight", "value.weight"))
        assert (id(parameter) in decaying) == linear, name
    assert TABLE_LR_FACTOR == 5.0
