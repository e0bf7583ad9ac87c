"""What a store process answers to people and programs: records as JSON text, and their decoders."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from engram_store.engine.garbage import GarbageReport, decode_report
from engram_store.errors import ProtocolError
from engram_store.layout.usage import SnapshotInfo, decode_snapshots, list_snapshots
from engram_store.session import SnapshotRef
from engram_store.v1 import store_pb2 as pb
from tests.fuzz.mutators import mutate_json, mutate_message
from tests.fuzz.samples import metadata, store_files
from tests.fuzz.target import Mutator, Target

_DEEP = b"[" * 5_000


def _check_snapshots(data: bytes) -> None:
    """A list of snapshots: what is accepted is what was said."""
    from engram_store_client.remote.administration import _decoded

    text = data.decode(errors="replace")
    found = _decoded("snapshots", text, decode_snapshots)
    for said, info in zip(json.loads(text), found, strict=True):
        _check_same(said, info)
    assert decode_snapshots(json.loads(json.dumps([info.to_json() for info in found]))) == found


def _check_report(data: bytes) -> None:
    """A report of what was removed."""
    from engram_store_client.remote.administration import _decoded

    text = data.decode(errors="replace")
    found = _decoded("report", text, decode_report)
    _check_same(json.loads(text), found)
    assert decode_report(json.loads(json.dumps(found.to_json()))) == found


def _check_same(said: Any, record: SnapshotInfo | GarbageReport) -> None:
    """No number is cut off, and no text is taken for a list or a number."""
    known = record.to_json()
    same = json.dumps({key: said[key] for key in known}, sort_keys=True)
    assert json.dumps(known, sort_keys=True) == same, "it says something else"


def _snapshot_lists() -> Iterator[bytes]:
    store = store_files()
    real = [info.to_json() for info in list_snapshots(store.paths, store.metadata)]
    entry: dict[str, Any] = {
        **real[0],
        "made": "2026-01-02T03:04:05Z",
        "pins": ["a", "b"],
        "segments": {"1": 2, "3": 0},
        "problem": "is damaged",
    }
    yield json.dumps(real).encode()
    yield json.dumps([entry, *real]).encode()
    for change in (
        {"own_bytes": float("inf")},
        {"own_bytes": 7.5},
        {"step": "7"},
        {"pins": "ab"},
        {"made": None},
        {"generations": {"1": True}},
        {"segments": {" 1": 2}},
    ):
        yield json.dumps([{**entry, **change}]).encode()
    yield from (b"{}", b"[]", b"", _DEEP)


def _reports() -> Iterator[bytes]:
    report = GarbageReport(
        removed=(0, 5),
        kept=(7, 9),
        pinned={7: ("a", "b")},
        in_use=(9,),
        directories=("layers/1/base/g0001",),
        freed_bytes=4096,
        dry_run=False,
    ).to_json()
    yield json.dumps(report).encode()
    for change in (
        {"freed_bytes": float("inf")},
        {"removed": "123"},
        {"dry_run": 1},
        {"pinned": {"7": "ab"}},
        {"kept": [1.5]},
        {"directories": [3]},
    ):
        yield json.dumps({**report, **change}).encode()
    yield from (b"[]", b"", _DEEP)


# ---------------------------------------------------------------------- every call


class _Stub:
    """Answers every call with the same bytes, as gRPC would hand them over."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def __getattr__(self, name: str) -> Callable[..., Message]:
        kind = pb.DESCRIPTOR.services_by_name["StoreService"].methods_by_name[name].output_type
        message: Any = getattr(pb, kind.name)
        return lambda _request, timeout: message.FromString(self._answer)


def _is_object(said: Any, found: Any) -> bool:
    """The result is the JSON object of the answer's only field."""
    (_, text), *_ = said.ListFields()
    return type(found) is dict and json.dumps(found) == json.dumps(json.loads(text))


_CALLS: dict[str, tuple[type[Message], Callable[[Any], Any], Callable[[Any, Any], bool]]] = {
    # Its answer, the call, and what the result has to be.
    "list": (
        pb.ListStoresResponse,
        lambda admin: admin.list_stores(),
        lambda _, found: all(isinstance(entry.name, str) for entry in found),
    ),
    "inspect": (
        pb.InspectStoreResponse,
        lambda admin: admin.inspect(),
        _is_object,
    ),
    "statistics": (
        pb.GetStatisticsResponse,
        lambda admin: admin.statistics(),
        lambda _, found: all(isinstance(layer, int) for layer in found.tables),
    ),
    "steps": (
        pb.ListSnapshotsResponse,
        lambda admin: admin.snapshots(),
        lambda _, found: all(type(step) is int for step in found),
    ),
    "snapshots": (
        pb.ListSnapshotsResponse,
        lambda admin: admin.describe_snapshots(),
        lambda _, found: all(type(info.step) is int for info in found),
    ),
    "pin": (
        pb.PinSnapshotResponse,
        lambda admin: admin.pin("newest", "best"),
        lambda _, found: isinstance(found, SnapshotRef),
    ),
    "snapshot": (
        pb.CreateSnapshotResponse,
        lambda admin: admin.snapshot(pin="best"),
        lambda _, found: isinstance(found, SnapshotRef),
    ),
    "garbage": (
        pb.CollectGarbageResponse,
        lambda admin: admin.collect_garbage(1),
        lambda _, found: type(found.freed_bytes) is int,
    ),
    "restore": (
        pb.RestoreSnapshotResponse,
        lambda admin: admin.restore(3),
        lambda _, found: type(found) is int,
    ),
    "verify": (
        pb.VerifyStoreResponse,
        lambda admin: admin.verify(),
        _is_object,
    ),
    "create": (
        pb.CreateStoreResponse,
        lambda admin: admin.create_store("a", metadata().recipe, dim=4),
        lambda _, found: isinstance(found, str),
    ),
}
_NAMES = tuple(_CALLS)


def _check_administration(data: bytes) -> None:
    """The first byte names the call; the rest answers it."""
    from engram_store_client.remote.administration import Administration

    kind, ask, is_right = _CALLS[_NAMES[(data or b"\0")[0] % len(_NAMES)]]
    said = kind.FromString(data[1:])  # as gRPC does before anybody sees the answer
    admin: Any = Administration.__new__(Administration)  # without a channel
    admin._address, admin._tls, admin._stub = "unix:nowhere", None, _Stub(data[1:])
    admin._deadline_seconds = admin._work_seconds = 1.0
    assert is_right(said, ask(admin)), "not what the call promises"


def _answers() -> Iterator[bytes]:
    snapshots, reports, deep = next(_snapshot_lists()), next(_reports()), _DEEP.decode()
    ref = pb.SnapshotRef(store_id=metadata().store_id, step=3, digest="ab" * 32)
    good: dict[str, Message] = {
        "inspect": pb.InspectStoreResponse(description_json='{"step": 3}'),
        "list": pb.ListStoresResponse(stores=[pb.StoreSummary(name="a", step=3)]),
        "steps": pb.ListSnapshotsResponse(steps=[1, 2]),
        "snapshots": pb.ListSnapshotsResponse(steps=[0], details_json=snapshots.decode()),
        "pin": pb.PinSnapshotResponse(snapshot=ref),
        "snapshot": pb.CreateSnapshotResponse(snapshot=ref),
        "garbage": pb.CollectGarbageResponse(report_json=reports.decode()),
        "restore": pb.RestoreSnapshotResponse(step=3),
        "verify": pb.VerifyStoreResponse(report_json='{"ok": true}'),
        "create": pb.CreateStoreResponse(store_id="ab" * 16),
    }
    for name, message in good.items():
        yield bytes([_NAMES.index(name)]) + message.SerializeToString()
    for text in ("[]", '[["ok", true]]', '""', "null", "7", "{", deep, "NaN"):
        verified = pb.VerifyStoreResponse(report_json=text)
        yield bytes([_NAMES.index("verify")]) + verified.SerializeToString()
        counted = pb.GetStatisticsResponse(statistics_json=text)
        yield bytes([_NAMES.index("statistics")]) + counted.SerializeToString()


def _mutate_answer(data: bytes, rng: Any) -> bytes:
    kind = _CALLS[_NAMES[(data or b"\0")[0] % len(_NAMES)]][0]
    change: Mutator = mutate_message(kind)
    return data[:1] + change(data[1:], rng)


TARGETS = (
    Target(
        name="snapshot-list",
        check=_check_snapshots,
        seeds=_snapshot_lists,
        allowed=(ProtocolError,),
        mutate=mutate_json,
        needs=("grpc",),
    ),
    Target(
        name="garbage-report",
        check=_check_report,
        seeds=_reports,
        allowed=(ProtocolError,),
        mutate=mutate_json,
        needs=("grpc",),
    ),
    Target(
        name="administration",
        check=_check_administration,
        seeds=_answers,
        allowed=(ProtocolError, DecodeError),
        mutate=_mutate_answer,
        needs=("grpc",),
    ),
)
