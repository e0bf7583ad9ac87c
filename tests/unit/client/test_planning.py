"""Plans and what they lead to: totals, refusals, what would fit, and the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.cli import main
from engram_store.errors import ConfigError
from engram_store_client.planning import (
    DISK,
    MEMORY,
    VRAM,
    Limits,
    ModelShape,
    Setup,
    TableShape,
    alternatives,
    check_fits,
    make_plan,
    parse_size,
    read_model,
    tables_of_store,
)

SIZES = (
    "hidden=2560,layers=36,heads=32,kv_heads=8,head_dim=128,intermediate=9728,vocabulary=151936,"
    "tied=true,qk_norm=true"
)
QWEN3_4B = ModelShape.parse(SIZES)
FOUR_TABLES = TableShape(layers=(1, 9, 17, 25), rows_per_head=1_220_000, dim=64)
CARD = Limits(vram=parse_size("24GB"), memory=parse_size("64GB"), disk=parse_size("200GB"))


def setup_4b(**changes: Any) -> Setup:
    common: dict[str, Any] = {"model": QWEN3_4B, "tables": FOUR_TABLES}
    return Setup(**common | changes)


def run(*arguments: object) -> int:
    """Run a command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_a_4b_base_with_ten_gigabytes_of_tables_fits_one_card_of_24() -> None:
    """Frozen, and with LoRA; the tables are on the disk alone."""
    frozen = make_plan(setup_4b(checkpointing=True, accumulate=8), CARD)
    lora = make_plan(setup_4b(checkpointing=True, mode="preserve_trainable", lora_rank=16), CARD)
    assert frozen.fits
    assert lora.fits
    assert lora.total(VRAM) > make_plan(setup_4b(checkpointing=True), CARD).total(VRAM)
    rows = sum(spec.rows * spec.row_bytes for spec in FOUR_TABLES.specs)
    assert 9.9e9 < rows < 10.1e9
    assert frozen.total(DISK) > rows
    assert "It fits." in str(frozen)


def test_vram_does_not_know_how_large_the_tables_are() -> None:
    """Nor does pinned memory; the host's and the disk's grow."""
    small = make_plan(setup_4b(), CARD)
    large = make_plan(setup_4b(tables=replace(FOUR_TABLES, rows_per_head=12_200_000)), CARD)
    assert large.total(VRAM) == small.total(VRAM)
    assert large.pinned_bytes == small.pinned_bytes
    assert large.total(MEMORY) > small.total(MEMORY)
    assert large.total(DISK) > 5 * small.total(DISK)


@pytest.mark.parametrize(
    ("changes", "limits", "first"),
    [
        ({"batch": 4}, CARD, "batch 1, accumulated 4 times"),
        ({"batch": 2}, replace(CARD, vram=20 * 10**9), "gradient checkpointing"),
        ({"mode": "full", "checkpointing": True}, CARD, "LoRA of rank 16 instead of all weights"),
        ({"checkpointing": True}, replace(CARD, vram=12 * 10**9), "a base of 8bit"),
        ({}, replace(CARD, disk=50 * 10**9), "1 snapshot kept"),
        ({"snapshots": 1}, replace(CARD, disk=60 * 10**9), "1 checkpoint kept"),
        (
            {"tables": replace(FOUR_TABLES, rows_per_head=20_000_000)},
            Limits(vram=CARD.vram, memory=10 * 10**9),
            "rows per head",
        ),
        ({"mode": "full", "device": "cpu"}, replace(CARD, memory=24 * 10**9), "LoRA"),
    ],
)
def test_what_would_fit_is_found_and_fits(
    changes: dict[str, Any], limits: Limits, first: str
) -> None:
    """The least drastic change comes first; each one told of is a run that fits."""
    setup = setup_4b(**changes)
    assert not make_plan(setup, limits).fits
    found = alternatives(setup, limits)
    assert first in found[0][0]
    assert all(plan.fits and plan == make_plan(plan.setup, limits) for _, plan in found)
    assert all(plan.setup.batch * plan.setup.accumulate >= setup.batch for _, plan in found)


def test_tables_of_a_store_are_never_changed(tmp_path: Path) -> None:
    """Where they are too large, nothing is proposed that would be another store."""
    path = make_store(tmp_path)
    setup = setup_4b(tables=tables_of_store(path), model=tiny_model(), snapshots=0, checkpoints=0)
    assert alternatives(setup, Limits(disk=1_000)) == []
    with pytest.raises(ConfigError, match="Nothing that could be changed"):
        check_fits(make_plan(setup, Limits(disk=1_000)))


def test_few_steps_leave_less_on_the_disk() -> None:
    """Without a fold there is no second base, and snapshots hold no more than was written."""
    any_number, few, many = (
        make_plan(setup_4b(steps=steps, checkpoints=0), CARD) for steps in (None, 100, 10**7)
    )
    assert few.total(DISK) < any_number.total(DISK) / 4
    parts = {line.part: line.bytes for line in few.lines}
    assert parts["a fold under way"] == 0
    assert many.total(DISK) == any_number.total(DISK)


def test_a_step_that_memtables_cannot_hold_by_default_says_what_does() -> None:
    """A million tokens a step update more rows than 1 GiB of memtables has slots for."""
    plan = make_plan(setup_4b(accumulate=512), CARD)
    assert plan.overlay_bytes is not None
    assert plan.overlay_bytes > 1 << 30
    assert f"overlay_bytes={plan.overlay_bytes:,}" in str(plan)
    assert make_plan(setup_4b(), CARD).overlay_bytes is None


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("500mb", 5 * 10**8), (7, 7)]
)
def test_sizes_are_read_with_their_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-1GB", "1e9"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="24GB"):
        parse_size(text, "--vram")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "all"}, "allowed are engram_only"),
        ({"batch": 0}, "at least 1"),
        ({"lora_rank": 4}, "engram_only trains no LoRA"),
        ({"mode": "full", "quantization": "4bit"}, "quantised base cannot be trained"),
        ({"tables": replace(FOUR_TABLES, layers=(1, 36))}, "layers 0 to 35"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_a_setup_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setup_4b(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "give a config.json"),
        ("{", "give a config.json"),
        ("[]", "no JSON object"),
        ('{"model_type": "llama"}', "hidden_size"),
    ],
)
def test_a_config_that_tells_no_sizes_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_model(tmp_path)


def make_store(tmp_path: Path) -> Path:
    path = tmp_path / "my.engram"
    shape = TableShape(layers=(0, 1), rows_per_head=300, heads=2, dim=8)
    recipe = shape.make_recipe(token_map=np.arange(99), pad_id=0, vocabulary=99, eos_id=0)
    engram_store.create(path, recipe, dim=8)
    return path


def tiny_model() -> ModelShape:
    return ModelShape.parse("hidden=32,layers=2,heads=2,intermediate=64,vocabulary=99")


def test_the_command_prints_a_plan_for_people_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a store's tables and a config.json; lines fit 80 columns."""
    path = make_store(tmp_path)
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99,
              "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ("plan", "--model", tmp_path, "--store", path, "--vram", "8GB", "--batch", 2)

    assert run(*asked) == 0
    text = capsys.readouterr().out
    assert run(*asked, "--json") == 0
    told = json.loads(capsys.readouterr().out)

    assert max(map(len, text.splitlines())) <= 80
    assert told["fits"]
    assert told["limits"][VRAM] == 8 * 10**9
    assert told["parameters"]["base"] == tiny_model().parameters
    assert told["parameters"]["tables"] == sum(s.rows * 8 for s in tables_of_store(path).specs)
    for resource, total in told["totals"].items():
        parts = [part["bytes"] for part in told["parts"] if part["resource"] == resource]
        assert sum(parts) == total
        assert f"{resource[0].upper()}{resource[1:]}: " in text


def test_the_command_refuses_what_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, with what would fit, in both forms."""
    asked = ("plan", "--sizes", SIZES, "--layers", "1,9", "--batch", 8, "--vram", "24GB",
             "--memory", "64GB", "--disk", "1TB")  # fmt: skip

    assert run(*asked) == 2
    text = capsys.readouterr().out
    assert run(*asked, "--json") == 2
    told = json.loads(capsys.readouterr().out)

    assert "TOO MUCH" in text
    assert told["short_of"] == [VRAM]
    assert told["would_fit"][0]["change"] in text
    assert all(other["fits"] for other in told["would_fit"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a model by --model"),
        (("--model", "x", "--sizes", SIZES), "give a model by --model"),
        (("--sizes", "hiden=3"), "is no size of a model"),
        (("--sizes", SIZES + ",qk_norm=maybe"), "true or false"),
        (("--sizes", "layers=3"), "need hidden"),
        (("--sizes", SIZES, "--recipe", "other"), "allowed are engram"),
        (("--sizes", SIZES, "--layers", "one"), "whole numbers"),
        (("--sizes", SIZES, "--vram", "much"), "--vram is 'much'"),
        (("--model", "/no/such/directory"), "cannot read a model"),
    ],
)
def test_bad_arguments_say_what_is_allowed(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", *arguments) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error


def test_a_plan_needs_neither_torch_nor_transformers() -> None:
    """In a fresh interpreter."""
    code = (
        "import sys\n"
        "from engram_store.cli import main\n"
        "try:\n"
        f"    main(['plan', '--sizes', '{SIZES}', '--vram', '24GB', '--disk', '1TB'])\n"
        "except SystemExit:\n"
        "    print(sorted({'torch', 'transformers', 'grpc'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]"
