"""A run's file: what is read, what is refused, and that schema, template and manual agree."""

import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from engram_store.errors import ConfigError
from engram_store_client.commands.plan import plan
from engram_store_client.commands.train import train
from engram_store_client.runs import RunSettings, read_settings, template_text
from engram_store_client.runs.settings import LoraSettings

MINIMAL = """
model: {path: base}
store: {path: my.engram}
data: {train: [a.txt]}
training: {output_dir: run}
"""
MANUAL = Path(__file__).parents[3] / "docs" / "sizing.md"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def keys(kind: Any = RunSettings, prefix: str = "") -> set[str]:
    """Every key of the schema, sections left out."""
    found = set()
    for name, hint in get_type_hints(kind).items():
        sections = [
            part for part in (hint, *get_args(hint)) if hasattr(part, "__dataclass_fields__")
        ]
        found |= keys(sections[0], f"{prefix}{name}.") if sections else {prefix + name}
    return found


def test_a_minimal_file_gets_the_defaults(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, MINIMAL))
    assert settings.model.dtype == "bfloat16"
    assert settings.mode == "engram_only"
    assert settings.memory.learning_rate_factor == 5.0
    assert settings.data.train == ("a.txt",)
    assert (settings.lora, settings.store.create, settings.resume) == (None, None, "auto")


def test_the_template_is_a_file_with_every_key(tmp_path: Path) -> None:
    """It can be read as it is; LoRA is a comment, and can be uncommented."""
    text = template_text()
    settings = read_settings(write(tmp_path, text))
    assert settings.lora is None
    assert settings.store.create is not None
    assert settings.training["learning_rate"] == 4e-4

    section = text[text.index("# lora:") : text.index("# The text.")]
    uncommented = text.replace(section, re.sub(r"^# ", "", section, flags=re.MULTILINE))
    settings = read_settings(write(tmp_path, uncommented))
    assert settings.lora == LoraSettings()
    assert settings.mode == "preserve_trainable"
    for key in keys():
        assert re.search(rf"^(# )? *{key.rpartition('.')[2]}:", text, re.MULTILINE), key


def test_the_manual_lists_every_key_and_no_other() -> None:
    """docs/sizing.md has a line for each key of the schema, with its default."""
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", MANUAL.read_text(), re.MULTILINE)
    documented = dict(rows)
    assert documented.keys() == keys()
    assert len(rows) == len(documented)
    for section, kind in get_type_hints(RunSettings).items():
        kinds = [part for part in (kind, *get_args(kind)) if is_dataclass(part)]
        for field in fields(kinds[0]) if kinds else ():
            told = documented.get(f"{section}.{field.name}")
            if told is not None and isinstance(field.default, int | str):
                assert told == f"`{str(field.default).lower()}`", (section, field.name)


@pytest.mark.parametrize("command", [plan, train])
def test_the_manual_names_every_option(command: Callable[..., None]) -> None:
    """Of `engram-store plan` and `engram-store train`."""
    text = MANUAL.read_text()
    renamed = {"overrides": "--set", "config": "run.yaml"}
    for name in inspect.signature(command).parameters:
        assert renamed.get(name, "--" + name.replace("_", "-")) in text, name


def test_keys_are_set_from_the_command_line(tmp_path: Path) -> None:
    """Over what the file says, in sections that it has or has not, with values of YAML."""
    overrides = ["lora.rank=4", "training.learning_rate=1e-4", "data.train=[b.txt, c.txt]",
                 "memory.layers=[1]", "model.dtype=float32"]  # fmt: skip
    settings = read_settings(write(tmp_path, MINIMAL), overrides)
    assert settings.lora == LoraSettings(rank=4)
    assert settings.training == {"output_dir": "run", "learning_rate": 1e-4}
    assert settings.data.train == ("b.txt", "c.txt")
    assert settings.memory.layers == (1,)
    assert settings.model.dtype == "float32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: a, dtyp: float32}", "model has no key 'dtyp'; did you mean dtype"),
        ("modle: {path: a}", "a run has no key 'modle'; did you mean model"),
        ("model: {path: a}\nmodel: {path: b}", "key 'model' comes twice, again in line"),
        ("lora: {rank: 0}", "at least 1"),
        ("lora: {rank: two}", "lora.rank is 'two'; it is a whole number"),
        ("lora: {rank: true}", "whole number"),
        ("lora: {targets: [q_proj, x]}", "lora.targets is 'x'; allowed are"),
        ("lora: {}\nmemory: {mode: full}", "leave one of the two out"),
        ("memory: {mode: all}", "memory.mode is 'all'; allowed are engram_only"),
        ("memory: {mode: full}\nmodel: {path: a, quantization: 4bit}", "quantised base"),
        ("memory: 3", "memory is 3; it takes keys"),
        ("store: {path: s, memory: lots}", "store.memory is 'lots'"),
        ("store: {path: s, create: {dim: 4}}", "store.create.layers is needed"),
        ("limits: {vram: big}", "limits.vram is 'big'"),
        ("data: {train: []}", "names no file"),
        ("data: {train: [a], time: 1}", "at least 2 tokens"),
        ("training: {}", "training.output_dir is needed"),
        ("model: {}", "model.path is needed: Directory"),
        ("- 1", "no keys"),
        ("a: [", "is no YAML"),
        ("1: 2", "keys are words"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    """With what is allowed; the other sections are as in the minimal file."""
    given = {line.partition(":")[0] for line in text.splitlines()}
    rest = [line for line in MINIMAL.splitlines() if line.partition(":")[0] not in given]
    whole = "\n".join([text, *rest]) if ":" in text else text
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_settings(write(tmp_path, whole))


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", "model.path.x=1", "training=[1]"])
def test_an_override_that_is_none_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(override.partition("=")[0] or "--set")):
        read_settings(write(tmp_path, MINIMAL), [override])


def test_a_file_that_is_not_there_points_to_the_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--template"):
        read_settings(tmp_path / "no.yaml")
