"""What a session says and hears, between calls and messages."""

from collections.abc import Mapping, Sequence

from engram_store import wire
from engram_store.errors import ConfigError, ProtocolError
from engram_store.layout.documents import parse_json
from engram_store.layout.metadata import decode_tables
from engram_store.recipes import Recipe
from engram_store.session import Applied
from engram_store.types import HyperParameters, TableSpec
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote.window import RemoteWindow, count_rows


def read_welcome(welcome: pb.Welcome) -> tuple[str, Recipe, Mapping[int, TableSpec]]:
    """The store's id, its recipe, and its tables by layer.

    Raises:
        ConfigError, ProtocolError: the store describes itself in a way not known here.
    """
    token_map = wire.decode_array(welcome.token_map) if welcome.HasField("token_map") else None
    try:
        described, tables = parse_json(welcome.recipe_json), parse_json(welcome.tables_json)
    except ValueError as error:
        raise ProtocolError(f"the store's description of itself is no JSON: {error}") from error
    recipe = Recipe.from_json(described, token_map)
    return welcome.store_id, recipe, decode_tables(tables, recipe)


def rates_by_layer(
    lr: float | Mapping[int, float], layers: Mapping[int, TableSpec]
) -> dict[int, float]:
    """A learning rate for every layer. Raises: ConfigError."""
    if not isinstance(lr, Mapping):
        return dict.fromkeys(layers, lr)
    for layer in layers:
        if layer not in lr:
            raise ConfigError(f"no learning rate for layer {layer}; lr has layers {sorted(lr)}")
    return {layer: lr[layer] for layer in layers}


def commit_message(
    step: int,
    rates: dict[int, float],
    gradient_scale: float,
    eps: float | None,
    betas: tuple[float, float],
    *,
    early: bool,
) -> pb.Commit:
    """Raises: ConfigError: a number makes no sense for an optimiser."""
    beta1, beta2 = betas
    for lr in rates.values():
        HyperParameters(lr=lr, eps=eps, beta1=beta1, beta2=beta2, gradient_scale=gradient_scale)
    # Messages take Python's own numbers only, and a rate may be numpy's or torch's.
    return pb.Commit(
        step=step,
        rates={layer: float(lr) for layer, lr in rates.items()},
        gradient_scale=float(gradient_scale),
        eps=None if eps is None else float(eps),
        beta1=float(beta1),
        beta2=float(beta2),
        early=early,
    )


def applied_record(
    message: pb.Applied, windows: Sequence[RemoteWindow], layers: Mapping[int, TableSpec]
) -> Applied:
    """What a commit did; counted here when only an earlier connection was told."""
    if not message.repeated:
        return Applied(
            step=message.step,
            rows={layer: message.rows.get(layer, 0) for layer in layers},
            skipped_rows={layer: message.skipped_rows.get(layer, 0) for layer in layers},
        )
    counts = {
        layer: count_rows(w.pushed[layer] for w in windows if layer in w.pushed) for layer in layers
    }
    return Applied(
        step=message.step,
        rows={layer: changed for layer, (changed, _) in counts.items()},
        skipped_rows={layer: skipped for layer, (_, skipped) in counts.items()},
    )
