"""Runs the memories of a model inside its forward pass, by hooks alone.

Hooks on the modules that a call goes through see its token ids. A hook on the backbone finds the
windows of a forward pass: those of its tickets, or such that are announced on the spot. A hook
before each decoder layer adds what the memories say to the hidden states, so that the layer's
attention sees it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engram_store.errors import ProtocolError
from engram_store_client.ids import Entries
from engram_store_client.passes import Reader, Share
from engram_store_client.structure import Decoder

HOOKED: WeakSet[nn.Module] = WeakSet()
"""Backbones that have hooks."""

_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class _Pass:
    """One forward pass of the backbone."""

    shares: list[Share]
    inputs: dict[int, int] = field(default_factory=dict)
    """Address of each layer's hidden states: tells this pass when a layer is run again."""

    def awaits_gradient(self, layer: int) -> bool:
        return any(share.awaits_gradient(layer) for share in self.shares)


class ModelHooks:
    """The hooks of one model, whatever the number of its memories.

    Memories do not see each other: each gets the hidden states as the model computed them, and
    what they say is added up.

    Args:
        decoder: the model's decoder layers.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.readers: list[Reader] = []
        self._entries = Entries()
        self._running: _Pass | None = None
        self._trained: list[_Pass] = []
        self._hooked: dict[nn.Module, list[RemovableHandle]] = {}
        self._layers: dict[int, RemovableHandle] = {}

    def add(self, reader: Reader, entries: tuple[nn.Module, ...]) -> None:
        """Let a memory take part, from the next forward pass on.

        Args:
            reader: the memory's side.
            entries: modules by which calls come in; the backbone is one of them.
        """
        for module in entries:
            if module not in self._hooked:
                self._hooked[module] = self._enter_by(module)
        for number in reader.gates:
            if number not in self._layers:
                layer = self.decoder.layer(number)
                hook = _eager(self._before_layer(number))
                self._layers[number] = layer.register_forward_pre_hook(hook, with_kwargs=True)
        _forget_compiled(entries)
        self.readers.append(reader)
        HOOKED.add(self.decoder.backbone)

    def remove(self, reader: Reader) -> None:
        """Take a memory out; with the last one every hook goes."""
        if reader in self.readers:
            self.readers.remove(reader)
            _forget_compiled(self._hooked)
        needed = {number for other in self.readers for number in other.gates}
        for number in self._layers.keys() - needed:
            self._layers.pop(number).remove()
        self._running = None
        for waiting in self._trained:
            waiting.shares = [share for share in waiting.shares if share.reader is not reader]
        if not self.readers:
            for handle in (handle for handles in self._hooked.values() for handle in handles):
                handle.remove()
            self._hooked = {}
            HOOKED.discard(self.decoder.backbone)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises: ProtocolError: sessions and windows cannot be copied."""
        raise ProtocolError(
            "a model with a memory cannot be copied or pickled: its hooks lead to an open store. "
            "detach() first, or save the gates with save_pretrained() and the model's state_dict()"
        )

    def _enter_by(self, module: nn.Module) -> list[RemovableHandle]:
        """Hooks around a module's call; around the backbone's, those that find the windows too."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
            others = self._entries.enter(module, args, kwargs)
            if module is self.decoder.backbone:
                self._begin()
            return args, others

        def leave(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if module is self.decoder.backbone:
                self._end(output)
            self._entries.leave(module)

        return [
            module.register_forward_pre_hook(_eager(enter), with_kwargs=True, prepend=True),
            module.register_forward_hook(_eager(leave), always_call=True),
        ]

    def _begin(self) -> None:
        """The backbone is called."""
        self._running = None  # an earlier pass may have failed on its way
        self._trained = [p for p in self._trained if any(not s.rows.closed for s in p.shares)]
        tickets = self._entries.take_tickets()
        running = _Pass([])
        try:
            for reader in self.readers:
                if reader.enabled:
                    training = self.decoder.backbone.training and torch.is_grad_enabled()
                    call = self._entries.call(tickets)
                    running.shares.append(reader.begin(call, training=training))
                else:
                    reader.turn_away(tickets)
            for share in running.shares:
                share.reader.windows.prefetch(share.rows, share.reader.gates)
        except BaseException:
            for share in running.shares:
                share.reader.give_up(share)
            raise
        self._running = running
        if any(share.rows.step is not None for share in running.shares):
            self._trained.append(running)

    def _end(self, output: Any) -> None:
        """The backbone returned, or failed."""
        done, self._running = self._running, None
        cache = getattr(output, "past_key_values", None)
        for share in [] if done is None else done.shares:
            share.reader.end(share, cache)

    def _before_layer(self, number: int) -> Callable[..., _Arguments]:
        """The hook of one decoder layer."""

        def add_residuals(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> _Arguments:
            hidden = args[0] if args else kwargs["hidden_states"]
            total = hidden
            for share in self._shares_of(number, hidden):
                total = total + share.residual(number, hidden)
            if args:
                return (total, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": total}

        return add_residuals

    def _shares_of(self, layer: int, hidden: Tensor) -> list[Share]:
        """The memories that say something before a layer, in the forward pass it belongs to.

        Outside of the backbone's forward pass the layer is run again by gradient checkpointing.
        Its input is then still the tensor of the first run, which checkpointing keeps alive: no
        younger pass that is still waiting for its backward pass can have the same address.
        """
        address = hidden.untyped_storage().data_ptr()
        if self._running is not None:
            self._running.inputs[layer] = address
            return _speaking(self._running, layer)
        waiting = [p for p in self._trained if p.awaits_gradient(layer)]
        for candidate in reversed(waiting):
            if candidate.inputs.get(layer) == address:
                return _speaking(candidate, layer)
        if len(waiting) == 1:
            return _speaking(waiting[0], layer)
        if not any(reader.enabled and layer in reader.gates for reader in self.readers):
            return []
        raise ProtocolError(
            f"decoder layer {layer} ran outside of the model's forward pass, and it is not clear "
            "for which of the open windows; run backward() of a micro-batch before the next forward"
        )


def _speaking(running: _Pass, layer: int) -> list[Share]:
    return [share for share in running.shares if layer in share.reader.gates]


def _eager(hook: _Hook) -> _Hook:
    """Let torch.compile step around a hook: what it does is not for a graph."""
    outside: _Hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return outside


def _forget_compiled(entries: Iterable[nn.Module]) -> None:
    """Let torch.compile look at the model again: it does not notice hooks that come or go."""
    modules = {module for entry in entries for module in entry.modules()}
    if any(
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in modules
    ):
        torch.compiler.reset()
