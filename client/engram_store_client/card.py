"""The README.md of a saved memory: what a model hub shows."""

from pathlib import Path

from torch import nn

from engram_store.layout.disk import Disk
from engram_store.layout.files import replace_file
from engram_store.session import Session
from engram_store_client.checkpoint import LIBRARY, Description

CARD_FILE = "README.md"
_MARK = f"library_name: {LIBRARY}"


def write_card(directory: Path, told: Description, session: Session, model: nn.Module) -> None:
    """Write a README.md, unless there is one that was not made here.

    Raises: DiskFullError, OSError.
    """
    path = directory / CARD_FILE
    if path.exists() and _MARK not in path.read_text(errors="replace")[:2000]:
        return
    replace_file(path, render_card(told, session, _base_model(model)).encode(), Disk())


def render_card(told: Description, session: Session, base_model: str | None) -> str:
    """A model card: front matter for the hub, then what a reader needs. Pure."""
    base = [] if base_model is None else [f"base_model: {base_model}"]
    rows = "\n".join(
        f"| {layer} | {spec.rows:,} | {spec.dim} | {spec.dtype} | {config.kind} |"
        for layer, config in sorted(told.gates.items())
        if (spec := session.tables.get(layer)) is not None
    )
    where = (
        f"The tables are here, in `{told.exported}`."
        if told.exported is not None
        else "The tables are not here: this is the dense part, and the name of a snapshot of the "
        f"store that has them (store `{told.snapshot.store_id}`, step {told.snapshot.step})."
    )
    needed = "" if told.exported is not None else ", session=engram.connect(STORE)"
    front = "\n".join(["---", _MARK, *base, "tags:", "- engram", "- engram-store", "---"])
    return f"""{front}

# An Engram memory

Tables of n-grams that a language model looks up by its tokens, with the gates that read them.
{where}

```python
import engram_store_client as engram

memory = engram.from_pretrained(model, DIRECTORY_OR_REPO_ID{needed})
```

Recipe `{session.recipe.family}`, fingerprint `{told.fingerprint}`, {told.step:,} steps.
Ids mean these rows for one tokenizer only; `tokenizer=` makes `from_pretrained` compare yours.

| layer | rows | values of a row | number format | gate |
|---:|---:|---:|---|---|
{rows}
"""


def _base_model(model: nn.Module) -> str | None:
    """The hub's name of the model, as far as its config tells; never a local path."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or name.count("/") > 1 or not name or Path(name).exists():
        return None
    return name if all(part and not part.startswith(".") for part in name.split("/")) else None
