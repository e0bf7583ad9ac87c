"""What all runs share: text, tokenizer and one base model, made once and kept in a directory."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.shape.errors import ShapeError
from engram_store_client.demo.base import (
    Sequences,
    encode,
    make_base,
    prepare_torch,
    train_base,
    train_tokenizer,
)
from engram_store_client.demo.corpus import collect
from engram_store_client.demo.files import DemoFiles
from engram_store_client.demo.settings import Settings

SETTINGS = Settings(
    seed=0,
    threads=1,
    vocabulary=2048,
    hidden=96,
    blocks=8,
    base_steps=800,
    eval_sequences=240,
    layers=(1,),
    heads=6,
    rows_per_head=20_000,
    dim=32,
)
"""The base, and what every run has unless its variant says otherwise."""
STEP_SEQUENCES = 8
"""Sequences of a step of a run; the base is trained with `SETTINGS.batch`."""

_BASE_FIELDS = (
    "seed",
    "threads",
    "code_chars",
    "prose_chars",
    "vocabulary",
    "hidden",
    "blocks",
    "time",
    "batch",
    "base_steps",
    "base_lr",
)
_DATA = ("prose", "held_out_prose", "held_out_code")

Say = Callable[[str], None]
"""Is told what goes on, for people."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """A base model that knows code, and the text of both domains as token ids [sequences, time]."""

    files: DemoFiles
    settings: Settings
    prose: Sequences
    held_out_prose: Sequences
    held_out_code: Sequences
    weights: dict[str, torch.Tensor]
    facts: dict[str, Any]
    """What a record says about the base: settings, fingerprint, sizes."""

    def base(self) -> LlamaForCausalLM:
        """A fresh copy of the trained base."""
        model = make_base(self.settings)
        model.load_state_dict(self.weights)
        return model


def open_workshop(directory: Path, settings: Settings, say: Say = print) -> Workshop:
    """Read the base and its data, or make them if the directory has none.

    Text comes from this machine and is read only once, so that a package that is installed
    between two runs does not change the data of the second.

    Args:
        directory: gets all files; about 60 MB.
        settings: of the base and its data.
        say: told before anything that takes time.

    Raises:
        ShapeError: the directory holds a base of other settings.
    """
    files = DemoFiles(directory.absolute())
    facts_file = files.root / "workshop.json"
    wanted = {name: asdict(settings)[name] for name in _BASE_FIELDS}
    prepare_torch(settings)
    if not facts_file.exists():
        files.root.mkdir(parents=True, exist_ok=True)
        facts = {"settings": wanted, **_make(files, settings, say)}
        _write_whole(facts_file, json.dumps(facts, indent=2))
    facts = json.loads(facts_file.read_text())
    if facts["settings"] != wanted:
        different = sorted(k for k in wanted if facts["settings"].get(k) != wanted[k])
        raise ShapeError(
            f"{directory} holds a base whose {', '.join(different)} differ from the plan's; "
            "name another directory by --dir, or remove this one"
        )
    data: dict[str, Sequences] = {name: np.load(files.root / f"{name}.npy") for name in _DATA}
    return Workshop(files, settings, **data, weights=torch.load(files.base), facts=facts)


def _make(files: DemoFiles, settings: Settings, say: Say) -> dict[str, Any]:
    """Collect text, train tokenizer and base, write them, and tell what they are."""
    say("collecting text")
    code, prose = collect(settings.code_chars, settings.prose_chars)
    tokenizer = train_tokenizer((*code.train, *prose.train), settings.vocabulary)
    tokenizer.save(str(files.tokenizer))
    learned = encode(tokenizer, code.train, settings.time)
    parts = {
        name: encode(tokenizer, texts, settings.time)
        for name, texts in zip(_DATA, (prose.train, prose.held_out, code.held_out), strict=True)
    }
    for name, data in parts.items():
        np.save(files.root / f"{name}.npy", data)
    model = make_base(settings)

    def on_step(step: int, loss: float) -> None:
        if step % 50 == 0:
            say(f"base step {step} of {settings.base_steps}, loss {loss:.3f}")

    train_base(model, learned, settings, on_step)
    torch.save(model.state_dict(), files.base)
    return {
        "fingerprint": _fingerprint(files),
        "parameters": sum(p.numel() for p in model.parameters()),
        "files": {"code": code.files, "prose": prose.files},
        "tokens": {"code": learned.size, **{name: data.size for name, data in parts.items()}},
    }


def run_settings(settings: Settings, seed: int, **changes: Any) -> Settings:
    """The settings of one run on a base. Pure."""
    return replace(settings, seed=seed, batch=min(settings.batch, STEP_SEQUENCES), **changes)


def _fingerprint(files: DemoFiles) -> str:
    """Of everything that decides results: tokenizer, data, weights."""
    digest = hashlib.sha256()
    names = [files.tokenizer, files.base, *(files.root / f"{name}.npy" for name in _DATA)]
    for path in names:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is either there as a whole or not."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)  # noqa: PTH105 - the same either way
