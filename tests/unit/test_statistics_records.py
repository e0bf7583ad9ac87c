"""The frozen records of statistics: histograms, and their way through JSON."""

import json
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from engram_store.engine.statistics import WaitCounter
from engram_store.errors import ProtocolError
from engram_store.stats import WAIT_BUCKETS, Waits
from engram_store_client.remote.statistics import decode_statistics
from tests.pairs import Pair
from tests.unit.test_statistics import quiet


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (0.0, 0),
        (2.0**-21, 0),
        (2.0**-20, 1),
        (2.0**-19 - 2.0**-40, 1),
        (0.99, 20),
        (1.0, 21),
        (63.0, 26),
        (64.0, 27),
        (1e9, 27),
    ],
)
def test_waits_fall_into_buckets_that_double(seconds: float, bucket: int) -> None:
    """The bounds are those of the record's description."""
    counter = WaitCounter()
    counter.count(seconds)

    waits = counter.record()
    assert waits.counts.index(1) == bucket
    assert waits.total == 1
    assert waits.seconds == seconds
    bound = waits.below(1.0)
    assert bound is not None
    assert bound > seconds
    assert (bound == float("inf")) == (bucket == WAIT_BUCKETS - 1)


def test_a_share_of_waits_stays_below_a_bound() -> None:
    """From the fastest on."""
    counter = WaitCounter()
    for seconds in [0.001] * 98 + [1.5] * 2:
        counter.count(seconds)
    waits = counter.record()

    assert waits.below(0.5) == waits.below(0.98) == 2.0**-9
    assert waits.below(0.99) == 2.0
    assert Waits().below(0.5) is None


def test_records_do_not_change_after_they_were_made(pair: Pair) -> None:
    """Nor can anybody change them."""
    pair.train(1)
    stats = quiet(pair.store)
    text = json.dumps(asdict(stats))
    pair.train(3)
    pair.store.seal()

    assert json.dumps(asdict(stats)) == text
    for record in (stats, stats.waits, stats.tables[1], stats.tables[1].orders[0].heads[0]):
        name = next(iter(asdict(record)))
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, 1)


def test_records_come_back_from_json_as_they_were(pair: Pair) -> None:
    """With everything that is nested in them, as tuples again."""
    pair.train(3)
    pair.store.seal()
    stats = quiet(pair.store)

    assert decode_statistics(json.dumps(asdict(stats))) == stats


@pytest.mark.parametrize("session", ["store", "memory"])
@pytest.mark.parametrize(
    "change",
    [
        {"waits": 5},
        {"waits": {"counts": 7, "seconds": 0}},
        {"waits": {"counts": [], "minutes": 0}},
        {"surprise": 1},
        {"tables": {"1": {}}},
        {"tables": {"one": {}}},
    ],
)
def test_records_of_another_version_are_refused(
    pair: Pair, session: str, change: dict[str, Any]
) -> None:
    """With one error, whatever is wrong."""
    stats = pair.store.stats() if session == "store" else pair.oracle.stats()
    record = asdict(stats)
    assert decode_statistics(json.dumps(record)) == stats

    with pytest.raises(ProtocolError, match="not those of this version"):
        decode_statistics(json.dumps(record | change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("orders", 3),
        ("orders", ["bigrams"]),
        ("orders", [{"order": 2, "sampled_ngrams": 1, "heads": [{"rows": 4}]}]),
        ("growth", [[1, 2, 3]]),
        ("growth", [7]),
        ("waits", None),
    ],
)
def test_parts_of_tables_of_another_version_are_refused(
    pair: Pair, name: str, value: object
) -> None:
    """Like the rest."""
    record = asdict(pair.store.stats())
    record["tables"][1][name] = value

    with pytest.raises(ProtocolError, match="not those of this version"):
        decode_statistics(json.dumps(record))
