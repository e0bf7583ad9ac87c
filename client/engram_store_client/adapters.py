"""The memories of one model, by name: which there are, and which of them speak."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from torch import nn

from engram_store.errors import ConfigError
from engram_store_client.hooks import HOOKED, ModelHooks
from engram_store_client.parameters import TrainableFlags
from engram_store_client.structure import Decoder, unwrapped

if TYPE_CHECKING:
    from engram_store_client.memory import Memory

SUBMODULE = "engram_memory"
"""Under this name the gates are a submodule of the attached model."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class MemoryModules(nn.ModuleDict):
    """Gates of a model by memory, then layer; and what the memories of a model share.

    Args:
        model: gets it as a submodule.
        decoder: of that model.
    """

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.owner = (model,)  # a tuple, which keeps torch from seeing a submodule in it
        self.hooks = ModelHooks(decoder)
        self.memories: dict[str, Memory] = {}
        self.flags = TrainableFlags()

    def own_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """What a model has beside gates."""
        gates = {id(parameter) for parameter in self.parameters()}
        return (p for p in model.parameters() if id(p) not in gates)

    def add_memory(self, memory: "Memory", entries: tuple[nn.Module, ...]) -> None:
        """Put a memory's gates and hooks into the model."""
        (owner,) = self.owner
        if not self.memories:
            owner.add_module(SUBMODULE, self)
        self[memory.name] = memory.gates
        self.memories[memory.name] = memory
        self.hooks.add(memory.reader, entries)

    def remove_memory(self, memory: "Memory") -> None:
        """Take them out; the last one takes everything with it."""
        (owner,) = self.owner
        self.hooks.remove(memory.reader)
        if self.memories.get(memory.name) is memory:
            del self[memory.name], self.memories[memory.name]
        if not self.memories:
            self.flags.restore()
            if hasattr(owner, SUBMODULE):
                delattr(owner, SUBMODULE)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """See `ModelHooks`."""
        self.hooks.__reduce_ex__(protocol)


def memories(model: nn.Module) -> dict[str, "Memory"]:
    """The memories attached to a model, by name, in the order in which they were attached.

    Args:
        model: the one that was attached, a wrapper around it, or what is left of such a wrapper.
    """
    found = modules_of(model)
    return {} if found is None else dict(found.memories)


def set_active(model: nn.Module, names: str | Iterable[str] | Mapping[str, float]) -> None:
    """Let these memories of a model speak, and no others; what they say is added up.

    A memory that is not active neither announces windows nor reads rows.

    Args:
        model: as for `memories`.
        names: one or several; a mapping gives the scale of each too (`Memory.scale`).

    Raises:
        ConfigError: no memory of that name; nothing changed.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    there = memories(model)
    unknown = [name for name in chosen if name not in there]
    if unknown:
        raise ConfigError(
            f"the model has no memory called {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(map(repr, there)) or 'none'}"
        )
    for name, memory in there.items():
        memory.enabled = name in chosen
        if isinstance(names, Mapping) and name in names:
            memory.scale = names[name]


def modules_of(model: nn.Module) -> MemoryModules | None:
    """What the memories of a model share; None where it has none."""
    return next((m for m in model.modules() if isinstance(m, MemoryModules)), None)


def modules_for(model: nn.Module, decoder: Decoder, name: str) -> MemoryModules:
    """Where a new memory of a model goes; nothing is put into the model yet.

    Raises:
        ConfigError: the name cannot be used or is taken, or only a part of a model that has
            memories was given.
    """
    found = modules_of(model)
    if found is not None and name in found.memories:
        raise ConfigError(
            f"the model has a memory called {name!r} already; call its detach() first, or attach "
            "under another name (name=...)"
        )
    if found is None:
        if decoder.backbone in HOOKED:
            raise ConfigError(
                "the model is part of one that has a memory; attach to the one that was attached "
                "before, or detach its memory first"
            )
        core = unwrapped(model)
        if hasattr(core, SUBMODULE):
            raise ConfigError(f"{type(core).__name__} has an attribute {SUBMODULE!r} of its own")
        found = MemoryModules(core, decoder)
    if not _NAME.fullmatch(name) or hasattr(found, name) or "lora_" in name:
        raise ConfigError(
            f"a memory cannot be called {name!r}: use up to 64 letters, digits, dashes and "
            "underscores, no name of an attribute of torch.nn.ModuleDict, and not 'lora_', by "
            "which peft knows its own parameters"
        )
    return found
