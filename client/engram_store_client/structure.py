"""Finds the decoder layers of a Hugging Face causal language model by its structure."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from engram_store.errors import ConfigError

_LIST_NAMES = ("layers", "h", "blocks")
_MIXER_NAMES = (
    "self_attn",
    "attn",
    "attention",
    "linear_attn",
    "self_attention",
    "mamba",
    "mixer",
)
_EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_WRAPPERS = {
    "BaseTuner": "model",  # peft's LoraModel and its like
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
}
"""Classes that hold a whole model, by name: none of their libraries has to be there."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Where a model keeps its decoder layers."""

    backbone: nn.Module
    """The module that calls the layers."""
    layers: nn.ModuleList
    path: str
    """Name of `layers` within the model that was searched."""
    entries: tuple[nn.Module, ...] = ()
    """The modules from the searched model down to the backbone, both included: a forward pass
    comes in by one of them, with its token ids."""

    def layer(self, number: int) -> nn.Module:
        """One decoder layer. Raises: ConfigError when there is none of that number."""
        if not 0 <= number < len(self.layers):
            raise ConfigError(
                f"the model has no layer {number}: {self.path!r} holds layers 0 to "
                f"{len(self.layers) - 1}; was the store created for another model, or with layers "
                "counted from one?"
            )
        return self.layers[number]

    def hidden_size(self) -> int | None:
        """Width of the residual stream, as far as the model's config tells."""
        config = getattr(self.backbone, "config", None)
        size = getattr(config, "hidden_size", None)
        return size if isinstance(size, int) else None


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers, through any wrappers.

    They are the one `ModuleList` called layers, h or blocks whose elements have an attention
    (or another mixer) and whose owner embeds tokens: vision and audio towers embed none.

    Raises:
        ConfigError: there is none, or more than one, or the model is an encoder-decoder.
    """
    core = unwrapped(model)
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False) is True:
        raise ConfigError(
            f"{type(core).__name__} is an encoder-decoder; rows are looked up by the tokens of one "
            "causal language model, so attach to a decoder-only model"
        )
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    found = [_decoder(model, name, m) for name, m in lists.items() if _holds_layers(name, m)]
    candidates = [d for d in found if any(hasattr(d.backbone, e) for e in _EMBEDDING_NAMES)]
    if not candidates and _reads_tokens(core):
        candidates = found
    if len(candidates) == 1:
        return candidates[0]
    lengths = {name: len(modules) for name, modules in lists.items()}
    seen = [d.path for d in candidates] or (f"the lists {lengths}" if lists else "no ModuleList")
    raise ConfigError(
        f"cannot tell the decoder layers of {type(core).__name__}: expected one ModuleList named "
        f"{', '.join(_LIST_NAMES)} of layers with attention, in a module that embeds tokens; "
        f"found {seen!s:.500}. Pass the language model itself"
    )


def wrapped_models(model: nn.Module) -> Iterable[nn.Module]:
    """The model, then what it wraps, and so on: peft, torch.compile, data parallelism."""
    yield model
    names = {cls.__name__ for cls in type(model).__mro__}
    for name, attribute in _WRAPPERS.items():
        inner = dict(model.named_children()).get(attribute)
        if name in names and inner is not None:
            yield from wrapped_models(inner)
            return


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers that peft, torch.compile and data parallelism make."""
    *_, core = wrapped_models(model)
    return core


def _decoder(model: nn.Module, name: str, layers: nn.ModuleList) -> Decoder:
    """The decoder whose layers are called `name` in the model."""
    parts = name.split(".")[:-1]
    entries = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    return Decoder(entries[-1], layers, name, tuple(entries))


def _holds_layers(name: str, modules: nn.ModuleList) -> bool:
    if name.rpartition(".")[2] not in _LIST_NAMES or not len(modules):
        return False
    return all(any(hasattr(layer, mixer) for mixer in _MIXER_NAMES) for layer in modules)


def _reads_tokens(model: nn.Module) -> bool:
    """False for models that transformers says read pixels or sound."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"
