"""Finds the decoder layers of a Hugging Face causal language model by its structure."""

from dataclasses import dataclass

from torch import nn

from engram_store.errors import ConfigError

_LIST_NAMES = ("layers", "h", "blocks")
_MIXER_NAMES = ("self_attn", "attn", "attention", "linear_attn", "self_attention")
_EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in")


@dataclass(frozen=True, slots=True)
class Decoder:
    """Where a model keeps its decoder layers."""

    backbone: nn.Module
    """The module that calls the layers; its forward pass takes the token ids."""
    layers: nn.ModuleList
    path: str
    """Name of `layers` within the model that was searched."""

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
    (or another mixer) and whose owner embeds tokens.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [
        Decoder(model.get_submodule(name.rpartition(".")[0]), module, name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _holds_decoder_layers(name, module)
    ]
    embedding = [d for d in found if any(hasattr(d.backbone, e) for e in _EMBEDDING_NAMES)]
    candidates = embedding or found
    if len(candidates) == 1:
        return candidates[0]
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    seen = [d.path for d in candidates] or f"the lists {lists}" if lists else "no ModuleList"
    raise ConfigError(
        f"cannot tell the decoder layers of {type(model).__name__}: expected one ModuleList named "
        f"{', '.join(_LIST_NAMES)} of layers with attention, found {seen}; "
        "pass the language model itself"
    )


def _holds_decoder_layers(name: str, modules: nn.ModuleList) -> bool:
    if name.rpartition(".")[2] not in _LIST_NAMES or not len(modules):
        return False
    return all(any(hasattr(layer, mixer) for mixer in _MIXER_NAMES) for layer in modules)
