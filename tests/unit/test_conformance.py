"""Conformance: every golden vector passes, and nothing wrong passes in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from engram_store.cli.conformance import conformance
from engram_store.conformance import Report, exact, run
from engram_store.conformance import runner as runner_module
from engram_store.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden() -> Report:
    return run(GOLDEN)


def copy(target: Path, *patterns: str) -> Path:
    """Some golden files in a directory of their own."""
    for pattern in patterns:
        for path in GOLDEN.glob(pattern):
            shutil.copy(path, target)
    return target


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def test_every_golden_vector_passes(golden: Report) -> None:
    assert golden.misses == ()
    assert golden.ok


@pytest.mark.parametrize(
    ("kind", "total"),
    [
        ("normalizer", 152),
        ("recipe_a", 160),
        ("recipe_p", 116),
        ("recipe_b", 376),
        ("recipe_c", 36),
        ("real_release", 52),
        ("quant", 3),
        ("sparse_optim", 29),
        ("tensor_files", 11),
    ],
)
def test_every_kind_is_compared_in_full(golden: Report, kind: str, total: int) -> None:
    """The number of comparisons is part of the test: a checker must not skip quietly."""
    assert golden.kinds[kind].total == total


def test_gating_is_checked_or_the_reason_given(golden: Report) -> None:
    assert ("gating" in golden.kinds) != ("gating" in golden.not_checked)


def test_a_changed_row_is_a_miss_that_names_its_position(tmp_path: Path) -> None:
    def change(data: Any) -> None:
        data["configs"][0]["layers"]["2"]["table_rows"][1][2][3] += 1

    directory = copy(tmp_path, "recipe_c*")
    edit(directory / "recipe_c_qwen4_exp.json", change)

    report = run(directory)

    assert [miss.what for miss in report.misses] == [
        "config 0, layer 2, rows",
        "config 0, layer 2, rows in pieces",
    ]
    assert report.misses[0].detail.startswith("1 of 288 differ, first at [1, 2, 3]: got ")


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("recipe_a_official_demo.json", ("configs", 1, "lookup_table", 7)),
        ("recipe_a_official_demo.json", ("configs", 0, "multipliers", "15", 1)),
        ("recipe_a_official_demo.json", ("configs", 0, "cases", 3, "head_indices", "1", 0, 0, 0)),
        ("recipe_p_engram_peft.json", ("configs", 0, "primes_if_layer_hashed_alone", "15", 0, 0)),
        ("recipe_b_deepseek_v41.json", ("configs", 2, "offsets", "3", 2)),
        ("real_release_constants.json", ("C_qwen38_flash_next", "rows_per_shard")),
        ("real_release_constants.json", ("A_sizes", "demo_default", "rows", "15")),
        ("tensor_files.json", ("files", "gating_a_small", "B")),
    ],
)
def test_any_changed_number_is_a_miss(
    tmp_path: Path, path: str, keys: tuple[str | int, ...]
) -> None:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] += 1

    directory = copy(tmp_path, path, "tokenizer_*", "*.safetensors")
    edit(directory / path, change)
    assert run(directory).misses


def test_files_with_other_names_and_fewer_cases_are_found_by_their_beginning(
    tmp_path: Path,
) -> None:
    def shorten(data: Any) -> None:
        del data["configs"][1:]
        del data["configs"][0]["cases"][1:]

    copy(tmp_path, "recipe_b*", "tokenizer_*")
    path = tmp_path / "recipe_b_other.json"
    (tmp_path / "recipe_b_deepseek_v41.json").rename(path)
    edit(path, shorten)

    report = run(tmp_path)

    assert report.ok
    assert report.kinds["recipe_b"].total == 4 + 8 + 1 + 4


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("recipe_a_x.json", b"{", "JSONDecodeError"),
        ("recipe_a_x.json", b"{}", "KeyError"),
        ("recipe_a_x.json", b'{"configs": []}', "nothing in it was compared"),
        ("normalizer_x.json", b'{"cases": 3}', "TypeError"),
        ("quant_x.safetensors", b"short", "Safetensor"),
        ("mystery.json", b"{}", "of no known kind"),
    ],
)
def test_unreadable_empty_and_unknown_files_are_misses(
    tmp_path: Path, name: str, content: bytes, detail: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (miss,) = run(tmp_path).misses
    assert miss.file == name
    assert detail in miss.detail


def test_a_missing_tokenizer_is_a_miss(tmp_path: Path) -> None:
    misses = run(copy(tmp_path, "recipe_p*")).misses
    assert [miss.file for miss in misses] == ["recipe_p_engram_peft.json"]


def test_directories_without_vectors_are_refused(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError):
            run(directory)


class Plugin:
    """An entry point as `importlib.metadata` gives it."""

    name = "gating"

    def __init__(self, checker: Callable[[Path], Any] | ImportError) -> None:
        self.checker = checker

    def load(self) -> Callable[[Path], Any]:
        if isinstance(self.checker, ImportError):
            raise self.checker
        return self.checker


def with_plugins(monkeypatch: pytest.MonkeyPatch, *plugins: Plugin) -> None:
    monkeypatch.setattr(runner_module, "entry_points", lambda group: list(plugins))


def test_without_torch_gating_is_listed_as_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tmp_path, "gating_a_*")
    with_plugins(monkeypatch, Plugin(ModuleNotFoundError("no torch", name="torch")))
    assert run(tmp_path).not_checked == {"gating": "needs torch"}
    with_plugins(monkeypatch)
    assert run(tmp_path).not_checked == {"gating": "no checker for them is installed"}


def test_files_that_a_plugin_leaves_out_are_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tmp_path, "gating_a_*")
    one = exact("gating", "gating_a_hc1.safetensors", "gates", 1, 1)
    with_plugins(monkeypatch, Plugin(lambda directory: [one]))
    assert [miss.file for miss in run(tmp_path).misses] == ["gating_a_small.safetensors"]


def test_arrays_of_other_shapes_differ() -> None:
    comparison = exact("kind", "file", "what", np.zeros((2, 1)), np.zeros(2))
    assert not comparison.passed
    assert comparison.detail == "got shape [2, 1], expected [2]"


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(conformance)
    return CliRunner().invoke(app, list(arguments))


def test_command_prints_a_line_per_kind_and_succeeds() -> None:
    result = invoke(str(GOLDEN))
    assert result.exit_code == 0
    assert "152 of 152" in result.output


def test_command_fails_and_prints_misses(tmp_path: Path) -> None:
    (tmp_path / "normalizer.json").write_text('{"cases": []}', "utf-8")
    result = invoke(str(tmp_path))
    assert result.exit_code == 1
    assert "nothing in it was compared" in result.output.replace("\n", " ")
    assert isinstance(invoke(str(tmp_path / "absent")).exception, ConfigError)


def test_command_prints_json(tmp_path: Path) -> None:
    copy(tmp_path, "normalizer*")
    result = invoke(str(tmp_path), "--json")
    assert json.loads(result.output)["kinds"] == {"normalizer": {"passed": 152, "total": 152}}
