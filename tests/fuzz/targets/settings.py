"""What people hand over: settings, addresses, command lines, recipes, tokenizers, certificates."""

import contextlib
import hashlib
import io
import json
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engram_store.errors import ConfigError, RecipeError
from engram_store.recipes import Recipe, compress_vocabulary
from tests.fuzz.mutators import (
    SEPARATOR,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_parts,
    split,
)
from tests.fuzz.samples import plain_recipe, recipe
from tests.fuzz.target import MEBIBYTE, Target


def _check_config(data: bytes) -> None:
    """A TOML file, the environment as NAME=value lines, and options likewise."""
    from engram_store_server.config import load_config

    file, environment, options = (part.decode(errors="surrogateescape") for part in split(data, 3))
    try:
        settings = tomllib.loads(file)
    except (ValueError, RecursionError):
        return  # `_read_file` of the commands refuses the file
    env = dict(line.split("=", 1) for line in environment.split("\n") if "=" in line)
    flags: dict[str, Any] = dict(line.split("=", 1) for line in options.split("\n") if "=" in line)
    config, origins = load_config(settings, env, flags)
    assert config.max_sessions >= 1
    assert set(origins) >= {*settings, *flags}


def _configs() -> Iterator[bytes]:
    file = b'data_dir = "/data/a"\nmax_sessions = 8\nfold_ratio = 2.5\ninsecure = true\n'
    env = b"ENGRAM_STORE_DRAIN_SECONDS=3\nENGRAM_STORE_PORT=tcp://10.0.0.1:80\nHOME=/root"
    flags = b"tcp=127.0.0.1:7070\noverlay_bytes=1000000\nlog_format=json"
    yield SEPARATOR.join((file, env, flags))
    yield SEPARATOR.join((b"", b"ENGRAM_STORE_DATA_DIR=/a", b"tcp=[::1]:0\ninsecure=yes"))
    for line in (b"fold_ratio = 1" + b"0" * 400, b"max_sessions = 1.5", b'socket = "a\\u0000"'):
        yield SEPARATOR.join((b'data_dir = "a"\n' + line, b"", b""))


def _check_toml_file(data: bytes) -> None:
    from engram_store_server.commands import _read_file

    path = Path("settings.toml")
    path.write_bytes(data)
    assert isinstance(_read_file(path), dict)


def _toml_files() -> Iterator[bytes]:
    yield b'data_dir = "/data/a"\nmax_sessions = 8\n'
    yield b"\xff\xfe"
    yield b"a = " + b"[" * 5_000


def _check_address(data: bytes) -> None:
    from engram_store_client.transport import local_path, process_address

    text = data.decode(errors="surrogateescape")
    address = process_address(text)
    if address is None:
        assert isinstance(local_path(text), Path)
    else:
        assert address


def _addresses() -> Iterator[bytes]:
    for address in (
        "unix:///run/store.sock",
        "tcp://127.0.0.1:7070",
        "tcp://[::1]:7070",
        "file:///data/a.engram",
        "my.engram",
        "C:\\my.engram",
        "tcp://h:99999",
        "tcp://[::1",
        "unix://host/path",
        "tcp://user@h:1/x?y#z",
        "a\N{FULLWIDTH SOLIDUS}b://x",
    ):
        yield address.encode()


def _exit_code(arguments: list[str]) -> object:
    from engram_store.cli import main

    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return "none: it went on"


def _check_command(data: bytes) -> None:
    """A command line, one argument per line; every store it makes is of zeros and removed."""
    arguments = [line.decode(errors="replace") for line in data.split(b"\n")]
    # A program gets no NUL in an argument; nothing is to be written elsewhere; and benchmarks, a
    # store process and normal rows do as they are told, for as long as that takes.
    if any(word in " ".join(arguments) for word in ("\0", "/", "bench", "serve", "demo", "norm")):
        return
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.chdir(directory),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        code = _exit_code([*arguments[:1], "made.engram", *arguments[1:]])
    assert code in (0, 1, 2, 3), f"exit code {code}"


def _create(**options: object) -> bytes:
    given = {
        "recipe": "qwen3.8-ple",
        "layers": "2",
        "rows-per-head": "7",
        "dim": "4",
        "vocabulary": "50",
        "eos-id": "1",
        "heads": "2",
        **options,
    }
    return "\n".join(["create", *(f"--{key}={value}" for key, value in given.items())]).encode()


def _commands() -> Iterator[bytes]:
    yield _create()
    for changed in (
        {"heads": 10**9},
        {"rows-per-head": 2**31 - 1},
        {"dim": 2**60},
        {"dim": -1},
        {"vocabulary": 10**30},
        {"orders": "2,1000000000"},
        {"orders": "2,3,4"},
        {"layers": "2,-3"},
        {"layers": "1," * 50 + "2"},
        {"seed": -(10**30)},
        {"eos-id": 2**31},
        {"std": "nan"},
    ):
        yield _create(**changed)
    yield b"inspect"
    yield b"restore\n5"
    yield b"restore\n1e3"


_WORDS = (
    "--heads=0",
    "--heads=100000000",
    "--orders=2",
    "--orders=1,2",
    "--orders=3000",
    "--rows-per-head=2",
    "--rows-per-head=-7",
    "--rows-per-head=2147483629",
    "--dim=0",
    "--dim=1000000000000",
    "--layers=0",
    "--layers=1,1",
    "--vocabulary=0",
    "--eos-id=-1",
    "--seed=0x10",
    "--dtype=float64",
    "--optimizer=adam",
    "--rounding-seed=-5",
    "--json",
    "snapshots",
    "fold",
)


def _check_recipe(data: bytes) -> None:
    """A recipe's JSON, and its token map's bytes; the map's digest is made right."""
    described, ids = split(data, 2)
    try:
        values = json.loads(described)
    except (ValueError, RecursionError):
        return  # `parse_json` is the one who says so
    token_map = None
    if ids:
        token_map = np.frombuffer(ids[: len(ids) // 4 * 4], "<i4")
        if isinstance(values, dict) and values.get("token_map_sha256"):
            values["token_map_sha256"] = hashlib.sha256(token_map.tobytes()).hexdigest()
    found = Recipe.from_json(values, token_map)
    assert found.to_json() == {"separator": None, **values}
    numbers = [found.heads, found.vocabulary, found.filler, *found.orders]
    for layer in found.layers:
        numbers += [layer.layer, layer.row_multiple, *layer.multipliers, *sum(layer.moduli, ())]
    assert all(type(number) is int for number in numbers)
    assert found == Recipe.from_json(found.to_json(), token_map)
    for layer in found.layers:
        assert 0 < layer.rows < 2**31
        assert layer.rows <= layer.stored_rows
    assert found.columns == len(found.layers[0].offsets)


def _recipes() -> Iterator[bytes]:
    token_map = recipe().token_map
    assert token_map is not None
    yield json.dumps(recipe().to_json()).encode() + SEPARATOR + token_map.tobytes()
    yield json.dumps(plain_recipe().to_json()).encode() + SEPARATOR


def _check_tokenizer(data: bytes) -> None:
    path = Path("tokenizer.json")
    path.write_bytes(data)
    found = compress_vocabulary(str(path))
    assert found.min() == 0
    assert len(np.unique(found)) == found.max() + 1


def _tokenizers() -> Iterator[bytes]:
    vocabulary = {"<pad>": 0, "a": 1, "A": 2, " a": 3, "\u00e9": 4}
    word_level = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"}
    yield json.dumps({"version": "1.0", "added_tokens": [], "model": word_level}).encode()
    merges = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    decoder = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    yield json.dumps({"version": "1.0", "model": merges, "decoder": decoder}).encode()
    yield b"{}"


def _check_certificates(data: bytes) -> None:
    from engram_store.certificates import CertificatePaths, read_certificates

    authority, certificate, key = Path("authority"), Path("certificate"), Path("key")
    for path, content in zip((authority, certificate, key), split(data, 3), strict=True):
        path.write_bytes(content)
        path.chmod(0o600)
    read_certificates(
        CertificatePaths(authority=authority, certificate=certificate, key=key, serves=True)
    )


def _certificates() -> Iterator[bytes]:
    """Keys are new in every run: the only seeds that are not always the same."""
    if not _PEM:
        from tests.certificates import SERVER, Authority

        directory = Path(tempfile.mkdtemp(prefix="certificates-"))
        authority = Authority(directory)
        issued = authority.issue("localhost", purpose=SERVER)
        files = (authority.cert, issued.cert, issued.key)
        _PEM.extend(file.read_bytes() for file in files)
    yield SEPARATOR.join(_PEM)
    yield SEPARATOR.join((_PEM[1], _PEM[0], _PEM[2]))
    yield SEPARATOR.join((_PEM[0], _PEM[1] * 2, b""))


_PEM: list[bytes] = []


TARGETS = (
    Target(
        name="config",
        check=_check_config,
        seeds=_configs,
        allowed=(ConfigError,),
        mutate=mutate_parts(
            mutate_lines(
                "fold_ratio = 1e999", "tcp = 5", "socket = []", "drain_seconds = nan", "a = 1"
            ),
            mutate_lines("ENGRAM_STORE_X=1", "ENGRAM_STORE_MAX_SESSIONS=\u0665"),
            mutate_lines("tcp=[::1", "tcp=h:70000", "log_format=xml", "insecure=perhaps"),
        ),
    ),
    Target(
        name="config-file",
        check=_check_toml_file,
        seeds=_toml_files,
        allowed=(ConfigError,),
        mutate=mutate_lines("[a]", "[[a]]", "a.b = 1", "a = {b = [1, 2]}", "a = 1979-05-27"),
        needs=("grpc",),
    ),
    Target(
        name="address",
        check=_check_address,
        seeds=_addresses,
        allowed=(ConfigError,),
        mutate=mutate_lines("unix:", "tcp://", "tcp://[", "tcp://:0", "file://host/x", "//"),
    ),
    Target(
        name="command-line",
        check=_check_command,
        seeds=_commands,
        allowed=(),
        mutate=mutate_lines(*_WORDS),
        memory_bytes=512 * MEBIBYTE,
    ),
    Target(
        name="recipe",
        check=_check_recipe,
        seeds=_recipes,
        allowed=(RecipeError,),
        mutate=mutate_parts(mutate_json, mutate_bytes),
    ),
    Target(
        name="tokenizer",
        check=_check_tokenizer,
        seeds=_tokenizers,
        allowed=(RecipeError,),
        mutate=mutate_json,
    ),
    Target(
        name="certificates",
        check=_check_certificates,
        seeds=_certificates,
        allowed=(ConfigError,),
        mutate=mutate_parts(mutate_bytes, mutate_bytes, mutate_bytes),
        needs=("cryptography",),
    ),
)
