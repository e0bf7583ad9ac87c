from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_READ: _ClassVar[Mode]
    MODE_TRAIN: _ClassVar[Mode]
MODE_UNSPECIFIED: Mode
MODE_READ: Mode
MODE_TRAIN: Mode

class Array(_message.Message):
    __slots__ = ("dtype", "shape", "data", "slot", "in_chunks")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    IN_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    slot: SlotRange
    in_chunks: bool
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., slot: _Optional[_Union[SlotRange, _Mapping]] = ..., in_chunks: bool = ...) -> None: ...

class SlotRange(_message.Message):
    __slots__ = ("slot", "offset", "length", "sequence")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    offset: int
    length: int
    sequence: int
    def __init__(self, slot: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class SnapshotRef(_message.Message):
    __slots__ = ("store_id", "step", "digest")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    step: int
    digest: str
    def __init__(self, store_id: _Optional[str] = ..., step: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("id", "hello", "announce", "read", "release", "push", "gradient_norm", "commit", "take_snapshot", "restore", "goodbye", "gradient_chunk")
    ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    TAKE_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    id: int
    hello: Hello
    announce: Announce
    read: Read
    release: Release
    push: Push
    gradient_norm: GradientNorm
    commit: Commit
    take_snapshot: TakeSnapshot
    restore: Restore
    goodbye: Goodbye
    gradient_chunk: GradientChunk
    def __init__(self, id: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., announce: _Optional[_Union[Announce, _Mapping]] = ..., read: _Optional[_Union[Read, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., push: _Optional[_Union[Push, _Mapping]] = ..., gradient_norm: _Optional[_Union[GradientNorm, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., take_snapshot: _Optional[_Union[TakeSnapshot, _Mapping]] = ..., restore: _Optional[_Union[Restore, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., gradient_chunk: _Optional[_Union[GradientChunk, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("id", "failure", "welcome", "announced", "rows", "released", "pushed", "norm", "applied", "snapshot_taken", "restored", "farewell", "durable", "rows_chunk")
    ID_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_TAKEN_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    FAREWELL_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    ROWS_CHUNK_FIELD_NUMBER: _ClassVar[int]
    id: int
    failure: Failure
    welcome: Welcome
    announced: Announced
    rows: Rows
    released: Released
    pushed: Pushed
    norm: Norm
    applied: Applied
    snapshot_taken: SnapshotTaken
    restored: Restored
    farewell: Farewell
    durable: Durable
    rows_chunk: RowsChunk
    def __init__(self, id: _Optional[int] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., announced: _Optional[_Union[Announced, _Mapping]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., pushed: _Optional[_Union[Pushed, _Mapping]] = ..., norm: _Optional[_Union[Norm, _Mapping]] = ..., applied: _Optional[_Union[Applied, _Mapping]] = ..., snapshot_taken: _Optional[_Union[SnapshotTaken, _Mapping]] = ..., restored: _Optional[_Union[Restored, _Mapping]] = ..., farewell: _Optional[_Union[Farewell, _Mapping]] = ..., durable: _Optional[_Union[Durable, _Mapping]] = ..., rows_chunk: _Optional[_Union[RowsChunk, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("error", "message", "fields")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    error: str
    message: str
    fields: str
    def __init__(self, error: _Optional[str] = ..., message: _Optional[str] = ..., fields: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "oldest_protocol", "mode", "session_id", "epoch", "fingerprint", "shared_memory", "store", "rank", "world_size")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    oldest_protocol: int
    mode: Mode
    session_id: str
    epoch: int
    fingerprint: str
    shared_memory: bool
    store: str
    rank: int
    world_size: int
    def __init__(self, protocol: _Optional[int] = ..., oldest_protocol: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ..., session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., fingerprint: _Optional[str] = ..., shared_memory: bool = ..., store: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ...) -> None: ...

class Credits(_message.Message):
    __slots__ = ("bytes", "windows")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    windows: int
    def __init__(self, bytes: _Optional[int] = ..., windows: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "server_version", "store_id", "fingerprint", "recipe_json", "tables_json", "token_map", "step", "slot_token", "credits", "durable_step", "staleness")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    TABLES_JSON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MAP_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    server_version: str
    store_id: str
    fingerprint: str
    recipe_json: str
    tables_json: str
    token_map: Array
    step: int
    slot_token: bytes
    credits: Credits
    durable_step: int
    staleness: int
    def __init__(self, protocol: _Optional[int] = ..., server_version: _Optional[str] = ..., store_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., recipe_json: _Optional[str] = ..., tables_json: _Optional[str] = ..., token_map: _Optional[_Union[Array, _Mapping]] = ..., step: _Optional[int] = ..., slot_token: _Optional[bytes] = ..., credits: _Optional[_Union[Credits, _Mapping]] = ..., durable_step: _Optional[int] = ..., staleness: _Optional[int] = ...) -> None: ...

class Announce(_message.Message):
    __slots__ = ("window", "tokens", "step", "context", "attention_mask")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    window: int
    tokens: Array
    step: int
    context: Array
    attention_mask: Array
    def __init__(self, window: _Optional[int] = ..., tokens: _Optional[_Union[Array, _Mapping]] = ..., step: _Optional[int] = ..., context: _Optional[_Union[Array, _Mapping]] = ..., attention_mask: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class Announced(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Read(_message.Message):
    __slots__ = ("window", "layer")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    window: int
    layer: int
    def __init__(self, window: _Optional[int] = ..., layer: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("row_ids", "rows", "inverse")
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    INVERSE_FIELD_NUMBER: _ClassVar[int]
    row_ids: Array
    rows: Array
    inverse: Array
    def __init__(self, row_ids: _Optional[_Union[Array, _Mapping]] = ..., rows: _Optional[_Union[Array, _Mapping]] = ..., inverse: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class RowsChunk(_message.Message):
    __slots__ = ("array", "offset", "data")
    ARRAY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    array: int
    offset: int
    data: bytes
    def __init__(self, array: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("window",)
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    window: int
    def __init__(self, window: _Optional[int] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Farewell(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Durable(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("window", "layer", "gradients")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    window: int
    layer: int
    gradients: Array
    def __init__(self, window: _Optional[int] = ..., layer: _Optional[int] = ..., gradients: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class GradientChunk(_message.Message):
    __slots__ = ("window", "layer", "offset", "data")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    window: int
    layer: int
    offset: int
    data: bytes
    def __init__(self, window: _Optional[int] = ..., layer: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Pushed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GradientNorm(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Norm(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: float
    def __init__(self, value: _Optional[float] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("step", "rates", "gradient_scale", "eps", "beta1", "beta2", "early")
    class RatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_SCALE_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EARLY_FIELD_NUMBER: _ClassVar[int]
    step: int
    rates: _containers.ScalarMap[int, float]
    gradient_scale: float
    eps: float
    beta1: float
    beta2: float
    early: bool
    def __init__(self, step: _Optional[int] = ..., rates: _Optional[_Mapping[int, float]] = ..., gradient_scale: _Optional[float] = ..., eps: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., early: bool = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("step", "rows", "skipped_rows", "repeated")
    class RowsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class SkippedRowsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_ROWS_FIELD_NUMBER: _ClassVar[int]
    REPEATED_FIELD_NUMBER: _ClassVar[int]
    step: int
    rows: _containers.ScalarMap[int, int]
    skipped_rows: _containers.ScalarMap[int, int]
    repeated: bool
    def __init__(self, step: _Optional[int] = ..., rows: _Optional[_Mapping[int, int]] = ..., skipped_rows: _Optional[_Mapping[int, int]] = ..., repeated: bool = ...) -> None: ...

class TakeSnapshot(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotTaken(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotRef
    def __init__(self, snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotRef
    def __init__(self, snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ...) -> None: ...

class Restored(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class ListStoresRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListStoresResponse(_message.Message):
    __slots__ = ("stores",)
    STORES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[StoreSummary]
    def __init__(self, stores: _Optional[_Iterable[_Union[StoreSummary, _Mapping]]] = ...) -> None: ...

class StoreSummary(_message.Message):
    __slots__ = ("name", "store_id", "step", "fingerprint", "readers", "trainers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    TRAINERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    store_id: str
    step: int
    fingerprint: str
    readers: int
    trainers: int
    def __init__(self, name: _Optional[str] = ..., store_id: _Optional[str] = ..., step: _Optional[int] = ..., fingerprint: _Optional[str] = ..., readers: _Optional[int] = ..., trainers: _Optional[int] = ...) -> None: ...

class CreateStoreRequest(_message.Message):
    __slots__ = ("store", "recipe_json", "token_map", "options_json")
    STORE_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MAP_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_JSON_FIELD_NUMBER: _ClassVar[int]
    store: str
    recipe_json: str
    token_map: Array
    options_json: str
    def __init__(self, store: _Optional[str] = ..., recipe_json: _Optional[str] = ..., token_map: _Optional[_Union[Array, _Mapping]] = ..., options_json: _Optional[str] = ...) -> None: ...

class CreateStoreResponse(_message.Message):
    __slots__ = ("store_id",)
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    def __init__(self, store_id: _Optional[str] = ...) -> None: ...

class InspectStoreRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class InspectStoreResponse(_message.Message):
    __slots__ = ("description_json",)
    DESCRIPTION_JSON_FIELD_NUMBER: _ClassVar[int]
    description_json: str
    def __init__(self, description_json: _Optional[str] = ...) -> None: ...

class GetStatisticsRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class GetStatisticsResponse(_message.Message):
    __slots__ = ("statistics_json",)
    STATISTICS_JSON_FIELD_NUMBER: _ClassVar[int]
    statistics_json: str
    def __init__(self, statistics_json: _Optional[str] = ...) -> None: ...

class CreateSnapshotRequest(_message.Message):
    __slots__ = ("store", "pin")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    store: str
    pin: str
    def __init__(self, store: _Optional[str] = ..., pin: _Optional[str] = ...) -> None: ...

class CreateSnapshotResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotRef
    def __init__(self, snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ...) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ("store", "details")
    STORE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    store: str
    details: bool
    def __init__(self, store: _Optional[str] = ..., details: bool = ...) -> None: ...

class ListSnapshotsResponse(_message.Message):
    __slots__ = ("steps", "details_json")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    DETAILS_JSON_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    details_json: str
    def __init__(self, steps: _Optional[_Iterable[int]] = ..., details_json: _Optional[str] = ...) -> None: ...

class PinSnapshotRequest(_message.Message):
    __slots__ = ("store", "pin", "snapshot", "name", "move")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    store: str
    pin: str
    snapshot: SnapshotRef
    name: str
    move: bool
    def __init__(self, store: _Optional[str] = ..., pin: _Optional[str] = ..., snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ..., name: _Optional[str] = ..., move: bool = ...) -> None: ...

class PinSnapshotResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotRef
    def __init__(self, snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ...) -> None: ...

class UnpinSnapshotRequest(_message.Message):
    __slots__ = ("store", "pin")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    store: str
    pin: str
    def __init__(self, store: _Optional[str] = ..., pin: _Optional[str] = ...) -> None: ...

class UnpinSnapshotResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CollectGarbageRequest(_message.Message):
    __slots__ = ("store", "keep", "dry_run")
    STORE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    store: str
    keep: int
    dry_run: bool
    def __init__(self, store: _Optional[str] = ..., keep: _Optional[int] = ..., dry_run: bool = ...) -> None: ...

class CollectGarbageResponse(_message.Message):
    __slots__ = ("report_json",)
    REPORT_JSON_FIELD_NUMBER: _ClassVar[int]
    report_json: str
    def __init__(self, report_json: _Optional[str] = ...) -> None: ...

class RestoreSnapshotRequest(_message.Message):
    __slots__ = ("store", "snapshot", "name")
    STORE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    store: str
    snapshot: SnapshotRef
    name: str
    def __init__(self, store: _Optional[str] = ..., snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ..., name: _Optional[str] = ...) -> None: ...

class RestoreSnapshotResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class VerifyStoreRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class VerifyStoreResponse(_message.Message):
    __slots__ = ("report_json",)
    REPORT_JSON_FIELD_NUMBER: _ClassVar[int]
    report_json: str
    def __init__(self, report_json: _Optional[str] = ...) -> None: ...

class SealStoreRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class SealStoreResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FoldStoreRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class FoldStoreResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
