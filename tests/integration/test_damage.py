"""A damaged block of a store process: what trainers and administrators are told."""

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from engram_store.engine import Engine
from engram_store.errors import ChecksumError
from engram_store.layout.paths import StorePaths
from engram_store.v1 import store_pb2 as pb
from engram_store.v1 import store_pb2_grpc as pb_grpc
from engram_store_client import connect, connect_admin
from engram_store_server.config import ServerConfig
from engram_store_server.home import open_store
from tests.damage import changed, flip
from tests.pairs import MakePair
from tests.servers import serving

SECONDS = 60.0


def test_a_trainer_is_told_of_damage_and_goes_back(make_pair: MakePair, tmp_path: Path) -> None:
    """The same error class with file, block and rows; a sound snapshot is one call away."""
    pair = make_pair(options={"fold_ratio": 1e6})
    pair.train(1)
    sound = pair.snapshot()
    pair.store.fold()
    file = next((pair.path / "layers/1/base/g0002/rows/c").iterdir()) / "0"
    engine = pair.store._engine
    assert isinstance(engine, Engine)
    with (
        serving(pair.store, f"unix:{tmp_path}/s") as url,
        connect(url) as session,
        changed(file, flip(77)),
    ):
        engine._scrubber.scrub()
        # Block 0 has the rows 0 to 2,047 of 16,242: a window of 1,000 look-ups meets some.
        tokens = np.random.default_rng(1).integers(0, 500, (2, 60))
        window = session.announce(tokens, 1)
        with pytest.raises(ChecksumError, match=r"block 0 \(layer 1, rows 0 to 2,047\)"):
            window.rows(1)
        window.rows(2)
        with connect_admin(url) as admin:
            statistics = admin.statistics()
            assert statistics.damaged_blocks == 1
            assert str(file) in statistics.damages
            with pytest.raises(ChecksumError, match="block 0"):
                admin.fold()
        assert status_of_a_fold(url) == grpc.StatusCode.DATA_LOSS
        session.restore(sound)
        assert session.step == 1
        window = session.announce(tokens, 1)
        assert window.rows(1)[0].size


def status_of_a_fold(url: str) -> Any:
    with grpc.insecure_channel(url) as channel:
        stub: Any = pb_grpc.StoreServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.FoldStore(pb.FoldStoreRequest(), timeout=SECONDS)
    error: Any = caught.value
    return error.code()


def test_the_settings_of_a_process_reach_its_stores(make_pair: MakePair) -> None:
    """`fold_rate` and `scrub_rate`; the scrubber is on by default."""
    pair = make_pair()
    pair.store.close()
    config = ServerConfig(data_dir=pair.path, fold_rate=5e6)
    with open_store(StorePaths(pair.path), config, sharers=1) as store:
        assert isinstance(store._engine, Engine)
        assert store._engine.options.fold_bytes_per_second == 5e6
        assert store._engine.options.scrub_bytes_per_second == config.scrub_rate == 20e6
