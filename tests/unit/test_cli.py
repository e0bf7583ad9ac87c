"""The command line: what it makes and shows, how it fails, and what it imports."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "tokenizer_bytelevel.json"
ENGRAM = (
    *("--recipe", "engram", "--tokenizer", str(TOKENIZER), "--pad-id", "0", "--layers", "1,3"),
    *("--rows-per-head", "50", "--heads", "2", "--dim", "8"),
)


def run(*arguments: object) -> int:
    """Run a command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "my.engram"
    assert run("create", path, *ENGRAM) == 0
    return path


def test_a_created_store_is_what_the_options_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recipe, tables and initial rows; the tool tells what it made and what comes next."""
    path = tmp_path / "my.engram"

    code = run("create", path, *ENGRAM, "--init", "normal", "--std", "0.5", "--dtype", "float32",
               "--optimizer", "adam", "--orders", "2,3,4", "--seed", "7")  # fmt: skip

    assert code == 0
    assert "Next:" in capsys.readouterr().out
    with engram_store.open(path) as opened:
        assert sorted(opened.tables) == [1, 3]
        assert opened.recipe.orders == (2, 3, 4)
        spec = opened.tables[1]
        assert (spec.dim, str(spec.dtype), str(spec.optimizer)) == (8, "float32", "adam")
        rows = opened.read_rows(1, np.arange(100, dtype=np.int32))
        assert 0.4 < rows.std() < 0.6


def test_inspect_prints_the_same_facts_for_people_and_as_json(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fingerprint, tables and snapshots are in both; lines fit 80 columns."""
    capsys.readouterr()

    assert run("inspect", store, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert run("inspect", store) == 0
    text = capsys.readouterr().out

    assert data["fingerprint"] in text
    assert data["snapshots"] == [0]
    assert [table["layer"] for table in data["tables"]] == [1, 3]
    assert data["tables"][0]["generation"] == 1
    assert f"{data['tables'][0]['rows']:,}" in text
    # The path of a temporary directory may be longer than any terminal.
    assert all(len(line) <= 80 for line in text.splitlines() if str(store.parent) not in line)


@pytest.mark.parametrize(
    "arguments",
    [
        ("engram-peft", *ENGRAM[2:]),
        ("deepseek-v4.1", *ENGRAM[2:], "--orders", "2,3,4"),
        (
            *("qwen3.8-ple", "--vocabulary", "1000", "--eos-id", "3", "--layers", "2"),
            *("--rows-per-head", "50", "--dim", "8"),
        ),
    ],
)
def test_every_published_recipe_can_be_made(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """The family's name is the recipe's."""
    path = tmp_path / "my.engram"

    assert run("create", path, "--recipe", *arguments) == 0

    assert engram_store.inspect(path).metadata.recipe.family == arguments[0]


def test_rows_per_head_means_the_same_for_engram_peft(tmp_path: Path) -> None:
    """Its own interface counts all heads of an order; ours never does."""
    path = tmp_path / "my.engram"

    assert run("create", path, "--recipe", "engram-peft", *ENGRAM[2:]) == 0

    recipe = engram_store.inspect(path).metadata.recipe
    assert all(50 <= m < 120 for order in recipe.layers[0].moduli for m in order)


def test_the_padding_token_comes_from_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its only added token with 'pad' in the name; without one the option is asked for."""
    arguments = [a for i, a in enumerate(ENGRAM) if "--pad-id" not in (a, ENGRAM[i - 1])]
    named, nameless = tmp_path / "named.json", tmp_path / "nameless.json"
    data = json.loads(TOKENIZER.read_text("utf-8"))
    data["padding"], data["added_tokens"] = None, []
    nameless.write_text(json.dumps(data), "utf-8")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token, number = next(iter(data["model"]["vocab"].items()))
    del data["model"]["vocab"][token]
    pad = {"id": number, "content": "<|pad|>", "special": True, **flags}
    data["model"]["vocab"]["<|pad|>"] = number
    data["model"]["merges"] = []
    data["added_tokens"] = [pad]
    named.write_text(json.dumps(data), "utf-8")

    assert run("create", tmp_path / "a", *arguments, "--tokenizer", named) == 0
    assert f"Padding id {number}" in capsys.readouterr().out
    assert run("create", tmp_path / "b", *arguments, "--tokenizer", nameless) == 2
    assert "--pad-id" in capsys.readouterr().err


def test_a_file_at_which_the_tokenizers_library_panics_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its panic is no Exception; merges that make a token out of the vocabulary cause one."""
    file = tmp_path / "tokenizer.json"
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    file.write_text(json.dumps({"model": model}))

    assert run("create", tmp_path / "x", *ENGRAM, "--tokenizer", file) == 2

    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "cannot be read as a tokenizer.json" in said


def test_snapshots_can_be_listed_gone_back_to_and_folded(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The three commands that look after a store."""
    with engram_store.open(store, mode="train") as opened:
        window = opened.announce(np.array([[5, 6, 7]]), step=0)
        for layer in opened.tables:
            window.push(layer, np.ones((window.row_ids(layer).size, 8), np.float32))
        opened.commit(0, lr=0.1)
    capsys.readouterr()

    assert run("snapshots", store, "--json") == 0
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [0, 1]
    assert run("fold", store) == 0
    assert engram_store.inspect(store).tables[1].generation == 2
    assert run("restore", store, 0) == 0
    assert engram_store.inspect(store).step == 0
    assert run("restore", store, 5) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "absent.engram"), 3, "no store here"),
        (("create", "x", *ENGRAM[:-1], "0"), 2, "dim"),
        (("create", "x", *ENGRAM, "--layers", "one"), 2, "--layers"),
        (("create", "x", *ENGRAM, "--dtype", "int4"), 2, "int4"),
        (("create", "x", *ENGRAM, "--vocabulary", "5"), 2, "--vocabulary"),
        (("create", "x", *ENGRAM, "--tokenizer", "absent.json"), 2, "--tokenizer"),
        (("create", "x", "--recipe", "deepseek-v4.1", *ENGRAM[2:], "--seed", "1"), 2, "--seed"),
        (("create", "x", "--recipe", "deepseek-v4.1", *ENGRAM[2:], "--orders", "2,4"), 2, "gaps"),
        (
            ("create", "x", "--recipe", "deepseek-v4.1", *ENGRAM[2:], "--orders", "2,99999999999"),
            2,
            "gaps",
        ),
        (("create", "x", "--recipe", "qwen3.8-ple", *ENGRAM[4:]), 2, "--pad-id"),
        (("frobnicate",), 2, "frobnicate"),
        (("bench", "window", "--tokens", "1"), 2, "tokens"),
    ],
)
def test_errors_are_one_message_and_a_code(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On stderr, without a traceback, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)

    assert run(*arguments) == code

    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_bad_input(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and the store is as it was."""
    before = engram_store.inspect(store).metadata.store_id

    assert run("create", store, *ENGRAM) == 2

    assert "already exists" in capsys.readouterr().err
    assert engram_store.inspect(store).metadata.store_id == before


def test_a_store_in_use_cannot_be_opened(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3, and the holder is named."""
    with engram_store.open(store, mode="train"):
        assert run("fold", store) == 3

    assert "is open for training by" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, and those of other packages."""
    assert run("--help") == 0

    listed = capsys.readouterr().out
    for name in ("create", "inspect", "restore", "bench", "conformance", "demo"):
        assert f" {name} " in listed


@pytest.mark.parametrize("arguments", [("--help",), ("--version",)])
def test_help_loads_no_heavy_package(arguments: tuple[str, ...]) -> None:
    """A first useful line within half a second needs this."""
    code = (
        "import sys\n"
        "from engram_store.cli import main\n"
        f"try: main({list(arguments)})\n"
        "except SystemExit: pass\n"
        "heavy = {'numba', 'torch', 'zarr', 'transformers', 'tokenizers'} & sys.modules.keys()\n"
        "print('loaded', sorted(heavy), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr.strip() == "loaded []"


def test_version_is_the_distribution_s(capsys: pytest.CaptureFixture[str]) -> None:
    """What pip shows."""
    assert run("--version") == 0

    assert capsys.readouterr().out.strip() == f"engram-store {metadata.version('engram-store')}"


def test_a_command_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays listed, takes any arguments, and fails with one sentence."""
    (tmp_path / "needs_torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = metadata.EntryPoint("train", "needs_torch:command", "engram_store.commands")
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda group, name=None: [entry] if name in (None, "train") else [],
    )

    assert run("--help") == 0
    assert " train " in capsys.readouterr().out
    assert run("train", "--steps", "5", "file") == 2
    assert "pip install 'engram-store[torch]'" in capsys.readouterr().err
