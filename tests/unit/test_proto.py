"""The committed stubs are what the protocol generates."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = Path("engram_store/v1")


def test_make_proto_changes_nothing(tmp_path: Path) -> None:
    """Byte for byte, with the pinned generators; run `make proto` after editing a .proto file."""
    plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    outputs = ("python", "pyi", "grpc_python", "mypy_grpc")
    protos = sorted((ROOT / "proto" / PACKAGE).glob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}",
         f"--plugin=protoc-gen-mypy_grpc={plugin}",
         *(f"--{output}_out={tmp_path}" for output in outputs), *map(str, protos)],
        check=True,
    )  # fmt: skip

    made = {path.name: path.read_bytes() for path in (tmp_path / PACKAGE).iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / PACKAGE).glob("*_pb2*")}
    assert made.keys() == committed.keys()
    for name, content in made.items():
        assert content == committed[name], f"{name} differs from what `make proto` writes"
