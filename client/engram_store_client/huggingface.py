"""Gives a Hugging Face causal language model a memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engram_store.errors import ConfigError, UnknownLayerError
from engram_store.recipes.compression import TokenizerLike
from engram_store.session import Session
from engram_store_client import checkpoint
from engram_store_client.adapters import modules_for
from engram_store_client.gates import GateConfig, GateKind, build_gate
from engram_store_client.ids import DEFAULT_NAME
from engram_store_client.memory import Memory
from engram_store_client.parameters import Mode, checked_mode
from engram_store_client.saving import Access, tables_of, take_back
from engram_store_client.structure import Decoder, find_decoder, wrapped_models
from engram_store_client.vocabulary import check_tokenizer


def attach(
    model: nn.Module,
    session: Session,
    *,
    name: str = DEFAULT_NAME,
    mode: Mode | str = Mode.ENGRAM_ONLY,
    layers: Sequence[int] | None = None,
    gate: GateKind | str | None = None,
    zero_table: bool = False,
    dtype: torch.dtype | None = None,
    tokenizer: "TokenizerLike | None" = None,
    **options: Any,
) -> Memory:
    """Let decoder layers of a model look up rows of a store, by hooks; its code stays as it is.

    Before each of the layers runs, its gate's output is added to the hidden states.

    Args:
        model: a causal language model of Hugging Face's kind, the language model of a multimodal
            one, or a wrapper around one: of peft, torch.compile or data parallelism.
        session: the store.
        name: among the memories of the model; several may be attached, each to its own store.
        mode: what of the model is trained beside gates and tables. 'engram_only' freezes all of
            it; 'preserve_trainable' leaves it as it is, so that LoRA goes on training; 'full'
            trains all of it. Of several memories the last one attached decides. `Memory.detach`
            of the last one that is left restores what was found.
        layers: model layers, counted from zero; None: every layer the store has a table for.
            The tables of other layers are neither read nor changed.
        gate: which published module; None: the one that was published with the store's recipe.
        zero_table: the control arm: rows are replaced by zeros and tables are never changed.
            What it learns, the gates learn without a memory.
        dtype: of the gates and of the rows they see; None: the decoder layer's.
        tokenizer: the one that makes the model's ids: compared with the store's recipe.
        options: further fields of `GateConfig`, such as `bias`, `init` or `identity_init`.

    Raises:
        ConfigError: no decoder layers, no such layer or mode, an unknown option, a name that is
            taken, quantised weights and 'full', or a model that was wrapped for several ranks
            before.
        UnknownLayerError: the store has no table for a layer.
        FingerprintMismatchError: the store was created for another tokenizer.
        The model is as it was, in all cases.
    """
    decoder, chosen_mode = find_decoder(model), checked_mode(mode)
    chosen = _chosen_layers(decoder, session, layers)
    if tokenizer is not None:
        check_tokenizer(tokenizer, session.recipe)
    kind = _kind(session.recipe.family if gate is None else gate)
    configs = {number: _config(decoder, session, number, kind, options) for number in chosen}
    return _attach(
        model,
        decoder,
        session,
        configs,
        name=name,
        mode=chosen_mode,
        zero_table=zero_table,
        dtype=dtype,
    )


def from_pretrained(
    model: nn.Module,
    source: str | Path,
    session: Session | None = None,
    *,
    revision: str | None = None,
    local_dir: str | Path | None = None,
    access: Access = "read",
    name: str | None = None,
    mode: Mode | str = Mode.ENGRAM_ONLY,
    dtype: torch.dtype | None = None,
    tokenizer: "TokenizerLike | None" = None,
) -> Memory:
    """Attach what `Memory.save_pretrained` or `Memory.push_to_hub` saved.

    Args:
        model, mode, dtype, tokenizer: as for `attach`.
        source: a directory, or a repository of a model hub ('user/name').
        session: the store, which goes back to the checkpoint's snapshot unless it only reads.
            None: the tables in `source`, or the store directory that it names, is opened, and
            closed by `Memory.detach`.
        revision: of the repository.
        local_dir: where a repository's files go; needed to train tables that come with it, because
            the hub's cache must not be changed.
        access: how tables are opened here: 'read', or 'train', which takes the store back to the
            snapshot and forgets what is newer.
        name: of the memory; None: as it was saved.

    Raises:
        SnapshotMismatchError: a checkpoint without its snapshot.
        FingerprintMismatchError: the rows of the given session mean something else.
        StoreFileError: no checkpoint, or a damaged one.
        ConfigError: the checkpoint was made for another model, or what `attach` raises. The model
            is as it was, in all cases.
    """
    saved = _saved(source, revision, local_dir, access)
    told, decoder, chosen_mode = saved.description, find_decoder(model), checked_mode(mode)
    _check_sizes(decoder, told.gates)
    with tables_of(saved, session, access) as tables:
        checkpoint.check_meaning(saved, tables)
        if tokenizer is not None:
            check_tokenizer(tokenizer, tables.recipe)
        memory = _attach(
            model,
            decoder,
            tables,
            told.gates,
            name=told.name if name is None else name,
            mode=chosen_mode,
            zero_table=False,
            dtype=dtype,
            saved=saved,
        )
        try:
            take_back(saved, tables)  # last, because it cannot be undone
        except BaseException:
            memory.detach()
            raise
        memory.owns_session = session is None
    return memory


def _attach(
    model: nn.Module,
    decoder: Decoder,
    session: Session,
    configs: Mapping[int, GateConfig],
    *,
    name: str,
    mode: Mode,
    zero_table: bool,
    dtype: torch.dtype | None,
    saved: checkpoint.Checkpoint | None = None,
) -> Memory:
    """Make the gates and put them in: nothing of the model changes before all is checked."""
    _check_ranks(model)
    modules = modules_for(model, decoder, name)
    gates = {}
    for number, config in configs.items():
        device, layer_dtype = _place(decoder.layer(number), number)
        gates[number] = build_gate(config).to(device, dtype or layer_dtype)
    for number, state in ({} if saved is None else saved.states_for(gates)).items():
        gates[number].load_state_dict(state)
    memory = Memory(name, model, session, gates, modules, zero_table=zero_table)
    memory.install(decoder.entries, mode)
    return memory


def _chosen_layers(
    decoder: Decoder, session: Session, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Raises: ConfigError, UnknownLayerError."""
    if layers is None:
        chosen = tuple(sorted(session.tables))
    else:
        chosen = tuple(layers)
        if not chosen or any(type(n) is not int for n in chosen) or len(set(chosen)) < len(chosen):
            raise ConfigError(
                f"layers must be different whole numbers, at least one, got {list(chosen)!r:.200}; "
                f"the store has tables for {sorted(session.tables)}"
            )
    for number in chosen:
        if number not in session.tables:
            raise UnknownLayerError(number, sorted(session.tables))
        decoder.layer(number)
    return chosen


def _kind(name: str) -> GateKind:
    try:
        return GateKind(str(name))
    except ValueError:
        known = ", ".join(GateKind)
        raise ConfigError(f"unknown gate {name!r}; there are {known}") from None


def _config(
    decoder: Decoder, session: Session, number: int, kind: GateKind, options: dict[str, Any]
) -> GateConfig:
    """What one layer's gate is. Raises: ConfigError."""
    recipe = session.recipe
    fields = {
        "hidden_size": decoder.hidden_size(),
        "row_width": recipe.columns * session.tables[number].dim,
        "dilation": recipe.max_order,
        **options,
    }
    if fields["hidden_size"] is None:
        raise ConfigError("the model's config names no hidden_size; pass hidden_size=...")
    try:
        return GateConfig(kind=kind, **fields)
    except TypeError as error:
        known = ", ".join(GateConfig.__dataclass_fields__)
        raise ConfigError(f"{error}; gates have the options {known}") from error


def _place(layer: nn.Module, number: int) -> tuple[torch.device, torch.dtype]:
    """Device and number format of a layer's arithmetic: quantised weights do not tell the latter.

    Raises: ConfigError: the layer's weights are not there.
    """
    weights = [p for name, p in layer.named_parameters() if "lora_" not in name]
    like = next((p for p in weights if p.dtype in _ARITHMETIC), None)
    if like is None or like.device.type == "meta":
        problem = "has no weights of float32, bfloat16 or float16"
        if like is not None:
            problem = "has no weights on a device (it is on 'meta', as offloading leaves it)"
        raise ConfigError(
            f"decoder layer {number} {problem}, so its gate cannot be placed; load the model onto "
            "a device first"
        )
    return like.device, like.dtype


_ARITHMETIC = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_sizes(decoder: Decoder, gates: Mapping[int, GateConfig]) -> None:
    """Refuse gates of another model. Raises: ConfigError."""
    size = decoder.hidden_size()
    for number, config in gates.items():
        decoder.layer(number)
        if size is not None and size != config.hidden_size:
            raise ConfigError(
                f"the checkpoint's gates are for hidden states of {config.hidden_size} values, "
                f"this model's have {size}; attach it to the model it was trained with"
            )


def _check_ranks(model: nn.Module) -> None:
    """Refuse a model that is spread over devices already. Raises: ConfigError.

    What averages gradients over ranks does so for the parameters that it saw when it was made;
    gates that come later would drift apart on every rank, and nobody would notice.
    """
    for module in wrapped_models(model):
        if len(getattr(module, "device_ids", None) or ()) > 1:
            raise ConfigError(
                f"{type(module).__name__} copies the model onto several devices in each pass; a "
                "memory works with one process per device (DistributedDataParallel, torchrun)"
            )
        group = getattr(module, "process_group", None)
        if group is not None and group.size() > 1:
            raise ConfigError(
                f"{type(module).__name__} averages only the parameters that it was made with; "
                "attach the memory first, then wrap the model"
            )


def _saved(
    source: str | Path, revision: str | None, local_dir: str | Path | None, access: Access
) -> checkpoint.Checkpoint:
    """The checkpoint in a directory, or in a repository, which is downloaded."""
    path = Path(source)
    named = isinstance(source, str) and source.count("/") == 1 and source[0] not in "./~"
    if path.exists() or not named:
        return checkpoint.read(path)
    from engram_store_client.hub import fetch

    saved = checkpoint.read(fetch(str(source), revision=revision, local_dir=local_dir))
    if access == "train" and local_dir is None and saved.description.exported is not None:
        raise ConfigError(
            f"the tables of {source} came into the hub's cache, which must not be changed; "
            "pass local_dir=... to train them"
        )
    # Where a store was on somebody else's machine says nothing about this one.
    return replace(saved, description=replace(saved.description, location=None))
