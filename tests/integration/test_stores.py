"""Several stores in one process: trainers beside each other, administration, and a kill."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import engram_store
from engram_store.errors import (
    ConfigError,
    DiskFullError,
    ProtocolError,
    SnapshotMismatchError,
    StoreExistsError,
    UnknownStoreError,
)
from engram_store.recipes import Recipe
from engram_store.testing import MemorySession
from engram_store.types import TableSpec
from engram_store.v1 import store_pb2 as pb
from engram_store.v1.store_pb2_grpc import StoreServiceStub
from engram_store_client import connect, connect_admin
from engram_store_client.remote import RemoteOptions, RemoteSession
from engram_store_client.remote.administration import Administration
from engram_store_client.remote.session import Mode
from tests.integration.homes import HomeProcess
from tests.integration.serving import SECONDS, SERVICE, StoreProcess, connected
from tests.pairs import (
    DIM,
    INITIAL,
    MakeStore,
    Pair,
    assert_same_tables,
    make_oracle,
    random_tokens,
)

Start = Callable[..., HomeProcess]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Starts processes, and kills those that a failed test leaves."""
    started: list[HomeProcess] = []

    def begin(*options: str) -> HomeProcess:
        started.append(HomeProcess(home, *options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.fixture
def two(home: Path, make_store: MakeStore) -> list[Path]:
    """Two stores in the directory, of different rows."""
    return [
        make_store("home/a"),
        make_store("home/b", engram_store.Normal(std=0.5), optimizer="adam"),
    ]


@pytest.fixture
def oracles(recipe: Recipe) -> dict[str, Any]:
    return {
        "a.engram": make_oracle(recipe, INITIAL),
        "b.engram": make_oracle(recipe, engram_store.Normal(std=0.5), optimizer="adam"),
    }


def join(process: HomeProcess, name: str = "", mode: Mode = "train") -> RemoteSession:
    return RemoteSession(f"unix:{process.socket}", mode, RemoteOptions(store=name))


def paired(process: HomeProcess, name: str, oracle: Any, seed: int = 0) -> Pair:
    return Pair(join(process, name), oracle, np.random.default_rng(seed))


def closed_cleanly(process: HomeProcess) -> None:
    code, output, log = process.end()
    assert (code, output) == (0, ""), log


# ---------------------------------------------------------------------- training


def test_two_stores_are_trained_at_once(start: Start, two: list[Path], oracles: Any) -> None:
    """By two trainers, beside a reader: each store ends as its own oracle, bit for bit."""
    process = start()
    assert process.stores == 2
    assert process.socket == two[0].parent / "run" / "store.sock"
    pairs = [paired(process, name, oracle, seed) for seed, (name, oracle) in
             enumerate(oracles.items())]  # fmt: skip
    assert {pair.session.transport for pair in pairs} == {"shared memory"}  # type: ignore[attr-defined]

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda pair: pair.train(6), pairs))
    with join(process, "b.engram", "read") as reader, connect_admin(process.url) as admin:
        tokens = random_tokens(np.random.default_rng(9))
        rows, inverse = reader.announce(tokens).rows(1)
        expected, expected_inverse = oracles["b.engram"].announce(tokens).rows(1)
        np.testing.assert_array_equal(inverse, expected_inverse)
        assert rows.tobytes() == expected.tobytes()

        listed = admin.list_stores()
    assert [(entry.name, entry.step, entry.trainers, entry.readers) for entry in listed] == [
        ("a.engram", 6, 1, 0),
        ("b.engram", 6, 1, 1),
    ]

    for pair in pairs:
        pair.session.close()
    closed_cleanly(process)
    for path in two:
        with engram_store.open(path) as store:
            assert_same_tables(store, oracles[path.name])


def test_trainers_of_both_stores_go_on_after_a_kill(
    start: Start, two: list[Path], oracles: Any
) -> None:
    """Neither notices but by the time it takes, and no step of either store is lost or doubled."""
    process = start()
    pairs = [paired(process, name, oracle, seed) for seed, (name, oracle) in
             enumerate(oracles.items())]  # fmt: skip
    under_way = threading.Barrier(3)

    def train(pair: Pair) -> None:
        for step in range(12):
            window = pair.announce(random_tokens(pair.rng), step)
            window.push_random(pair.rng)
            if step == 4:
                under_way.wait(SECONDS)
            # What was applied is not compared: of a step whose answer was lost it is not known.
            pair.session.commit(step, 0.1)
            pair.oracle.commit(step, 0.1)

    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(train, pair) for pair in pairs]
        under_way.wait(SECONDS)
        process.end(signal.SIGKILL)
        again = start()
        for result in results:
            result.result()

    for pair in pairs:
        pair.session.close()
    closed_cleanly(again)
    for path in two:
        with engram_store.open(path) as store:
            assert store.step == 12
            assert_same_tables(store, oracles[path.name])


def test_a_store_can_be_made_and_trained_over_the_wire(
    start: Start, home: Path, recipe: Recipe
) -> None:
    """Beginning with nothing; it is there again at the next start."""
    process = start()
    assert process.stores == 0
    with connect_admin(process.url) as admin:
        assert admin.list_stores() == []
        with pytest.raises(UnknownStoreError):
            join(process)
        store_id = admin.create_store("new", recipe, dim=DIM, initial=INITIAL, dtype="float32",
                                      per_layer={2: {"optimizer": "sgd"}})  # fmt: skip
        with pytest.raises(StoreExistsError, match="choose another name"):
            admin.create_store("new", recipe, dim=DIM)
        with pytest.raises(ConfigError, match="cannot be named"):
            admin.create_store("../new", recipe, dim=DIM)
        with pytest.raises(DiskFullError, match="once every row was written"):
            admin.create_store("huge", recipe, dim=1 << 24)
        with connect(process.url) as session:
            assert session.store_id == store_id == admin.inspect()["store_id"]
            optimizers = [spec.optimizer for spec in session.tables.values()]
            assert optimizers == ["rowwise_adagrad", "sgd"]
            twin = oracle_of(recipe, session.tables)
            Pair(session, twin).train(3)

    closed_cleanly(process)
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == [
        ".creating",
        "new",
        "run",
    ]
    with engram_store.open(home / "new") as store:
        assert_same_tables(store, twin)
    assert start().stores == 1


def oracle_of(recipe: Recipe, tables: Mapping[int, TableSpec]) -> MemorySession:
    """With the initial rows of a store whose layers differ."""
    rows = {layer: INITIAL.rows(layer, 0, spec.rows, spec) for layer, spec in tables.items()}
    return MemorySession(recipe, dict(tables), rows)


# ---------------------------------------------------------------------- administration


@pytest.fixture
def served(start: Start, two: list[Path]) -> HomeProcess:
    return start()


@pytest.fixture
def admin(served: HomeProcess) -> Iterator[Administration]:
    with connect_admin(served.url) as calls:
        yield calls


def test_snapshots_seals_folds_and_counters_belong_to_a_store(
    served: HomeProcess, admin: Administration, oracles: Any
) -> None:
    """Each call takes a name, and changes nothing of the other store."""
    pair = paired(served, "a.engram", oracles["a.engram"])
    pair.train(2)
    taken = admin.snapshot("a.engram")
    pair.train(1)
    admin.seal("a.engram")
    admin.fold("a.engram")

    assert taken.step == 2
    assert admin.snapshots("a.engram") == [0, 2]
    assert admin.snapshots("b.engram") == [0]
    assert admin.statistics("a.engram").steps == 3
    assert admin.statistics("b.engram").steps == 0
    described = {name: admin.inspect(name) for name in oracles}
    assert [table["generation"] for table in described["a.engram"]["tables"]] == [2, 2]
    assert [table["generation"] for table in described["b.engram"]["tables"]] == [1, 1]

    with pytest.raises(ProtocolError, match="being trained"):
        admin.restore(taken, "a.engram")
    pair.session.close()
    assert admin.restore(taken, "a.engram") == 2
    assert admin.restore(0, "a.engram") == 0
    with pytest.raises(SnapshotMismatchError):
        admin.restore(taken, "a.engram")
    with pytest.raises(SnapshotMismatchError):
        admin.restore(7, "b.engram")


def test_an_unknown_store_is_refused_with_those_there_are(
    served: HomeProcess, admin: Administration
) -> None:
    """In sessions and in every call; so is no name at all."""
    named: list[Callable[[str], Any]] = [
        *(admin.inspect, admin.statistics, admin.snapshot, admin.snapshots),
        *(admin.verify, admin.seal, admin.fold),
        lambda name: admin.restore(0, name),
        lambda name: join(served, name),
    ]
    for name in ("c", ""):
        for ask in named:
            with pytest.raises(UnknownStoreError, match=r"a\.engram, b\.engram") as caught:
                ask(name)
            assert list(caught.value.names) == ["a.engram", "b.engram"]


def test_verification_tells_what_is_damaged(
    two: list[Path], served: HomeProcess, admin: Administration
) -> None:
    """In the store that is, while both are served."""
    damaged = two[1] / "layers" / "1" / "base" / "g0001" / "rows" / "c" / "0" / "0"
    with damaged.open("r+b") as file:
        file.seek(70_000)
        byte = file.read(1)[0]
        file.seek(70_000)
        file.write(bytes([byte ^ 1]))

    sound, report = admin.verify("a.engram"), admin.verify("b.engram")

    assert (sound["ok"], sound["damages"]) == (True, [])
    assert not report["ok"]
    (damage,) = report["damages"]
    assert damage["file"] == damaged.relative_to(two[1]).as_posix()
    assert (damage["layer"], damage["block"]) == (1, 1)


def test_a_process_of_one_store_takes_its_name_and_makes_no_others(
    make_store: MakeStore, recipe: Recipe
) -> None:
    """Its own name, or none."""
    process = StoreProcess(make_store())
    try:
        with connect_admin(f"unix://{process.socket}") as admin:
            assert admin.inspect() == admin.inspect("a.engram")
            with pytest.raises(UnknownStoreError, match=r"name one of a\.engram"):
                admin.inspect("b")
            with pytest.raises(ProtocolError, match="directory of stores"):
                admin.create_store("b", recipe, dim=DIM)
    finally:
        process.kill()


def test_reflection_lists_every_call(served: HomeProcess) -> None:
    """For tools that have no .proto file."""
    with connected(served.socket) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        answer = next(stub.ServerReflectionInfo(iter([request]), timeout=SECONDS))

    file = FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
    (service,) = file.service
    assert {method.name for method in service.method} == {
        *("Session", "ListStores", "CreateStore", "InspectStore", "GetStatistics"),
        *("CreateSnapshot", "ListSnapshots", "RestoreSnapshot", "VerifyStore", "SealStore"),
        *("FoldStore", "PinSnapshot", "UnpinSnapshot", "CollectGarbage"),
    }


def test_errors_have_the_status_that_tools_look_at(served: HomeProcess) -> None:
    """Without our client."""
    with connected(served.socket) as channel:
        stub = StoreServiceStub(channel)
        code = grpc.StatusCode
        for method, request, expected in (
            (stub.InspectStore, pb.InspectStoreRequest(store="c"), code.NOT_FOUND),
            (stub.CreateStore, pb.CreateStoreRequest(store="../c"), code.INVALID_ARGUMENT),
            (
                stub.RestoreSnapshot,
                pb.RestoreSnapshotRequest(store="a.engram", snapshot=pb.SnapshotRef(step=9)),
                code.NOT_FOUND,
            ),
        ):
            ask: Any = method
            with pytest.raises(grpc.RpcError) as caught:
                ask(request, timeout=SECONDS)
            assert caught.value.code() is expected
