"""What a language model is made of: read from its config.json, counted without building it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from engram_store.errors import ConfigError

_HUB_NAME = r"[\w.-]+/[\w.-]+"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of a decoder layer's matrices, as in transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder of Llama's kind. The embedding is counted once if it is tied."""

    hidden: int
    layers: int
    heads: int
    """Attention heads."""
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    """The output matrix is the embedding."""
    family: str = "llama"
    """`model_type` of its config."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normalised per head."""
    layer_norms: int = 2
    """RMS norms of one layer, those of queries and keys aside."""
    norms_in_fp32: bool = False
    """The norm's weight is applied before rounding (Gemma)."""
    softcapped: bool = False
    """Attention scores are capped (Gemma 2), so that all of them are kept."""
    counted: int | None = None
    """All parameters, where they were counted in files or in a model; None: the formula below."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (type(value) is not int or value < 1):
                raise ConfigError(f"the model's {field.name} is {value!r}; it is at least 1")

    @property
    def query_width(self) -> int:
        """Values of a token's queries."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Values of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix of a layer, by its name in transformers."""
        hidden, inner = self.hidden, self.intermediate
        queries, keys = self.query_width, self.key_width
        sizes = (
            (hidden, queries),
            (hidden, keys),
            (hidden, keys),
            (queries, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        )
        return dict(zip(LINEARS, sizes, strict=True))

    @property
    def matrix_parameters(self) -> int:
        """Weights of all layers' matrices: what quantisation shrinks."""
        return self.layers * sum(inputs * out for inputs, out in self.linear_sizes().values())

    @property
    def embedding_parameters(self) -> int:
        """The embedding, and the output matrix if it is another."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them: exact for the families that `read_model` knows."""
        if self.counted is not None:
            return self.counted
        layer = self.layer_norms * self.hidden + 2 * self.head_dim * self.qk_norm
        layer += (self.query_width + 2 * self.key_width) * self.qkv_bias
        layer += self.hidden * self.output_bias
        layer += (2 * self.intermediate + self.hidden) * self.mlp_bias
        return (
            self.matrix_parameters + self.embedding_parameters + self.layers * layer + self.hidden
        )

    @classmethod
    def parse(cls, text: str) -> "ModelShape":
        """From `hidden=2560,layers=36,...`. Raises: ConfigError."""
        known = {field.name: field.type for field in fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in known or not value:
                raise ConfigError(
                    f"{part!r} is no size of a model; give {', '.join(known)}, as in "
                    "hidden=2560,layers=36"
                )
            values[name] = _parsed(name, value, known[name])
        values.setdefault("kv_heads", values.get("heads"))
        if "head_dim" not in values and {"hidden", "heads"} <= values.keys():
            values["head_dim"] = values["hidden"] // max(values["heads"], 1)
        try:
            return cls(**values)
        except TypeError as error:
            needed = "hidden, layers, heads, intermediate, vocabulary"
            raise ConfigError(f"a model's sizes need {needed}; {error}") from None


def _parsed(name: str, value: str, kind: Any) -> Any:
    """Raises: ConfigError."""
    if kind in (bool, "bool"):
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{name} is {value!r}; it is true or false")
        return value.lower() == "true"
    if kind in (str, "str"):
        return value
    try:
        return int(value.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{name} is {value!r}; it is a whole number") from None


_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"biases": "attention_bias", "output_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"biases": "attention_bias", "output_bias": True, "qk_norm": True, "head_dim": 128},
    "gemma": {"biases": "attention_bias", "output_bias": True, "head_dim": 256, "tied": True},
    "gemma2": {
        "biases": "attention_bias",
        "output_bias": True,
        "head_dim": 256,
        "tied": True,
        "layer_norms": 4,
    },
    "gemma3_text": {
        "biases": "attention_bias",
        "output_bias": True,
        "head_dim": 256,
        "tied": True,
        "layer_norms": 4,
        "qk_norm": True,
    },
}
"""What the classes of transformers 5 do that a config.json may leave unsaid."""


def read_model(path: str | Path) -> ModelShape:
    """A model's sizes, from its config.json; weights are only counted, never loaded.

    Families that are not known here are built by transformers without memory for their weights
    (torch's meta device), to count them.

    Args:
        path: a config.json, a directory with one, as `save_pretrained` writes it, or a name on
            the Hugging Face hub (of which config.json alone is fetched).

    Raises:
        ConfigError: there is none, it is damaged, or of a family that cannot be counted.
    """
    file = Path(path)
    if not file.exists() and re.fullmatch(_HUB_NAME, str(path)):
        file = _from_hub(str(path))
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a model from {path}: {error}; give a config.json of a Hugging Face "
            "model, or a directory with one"
        ) from error
    shape = model_of_config(config)
    stored = _stored_parameters(file.parent)
    if stored is None:
        return shape
    return replace(shape, counted=stored)


def model_of_config(config: Mapping[str, Any]) -> ModelShape:
    """The sizes that a config names: a config.json's content, or `config.to_dict()`.

    Of a multimodal model the language model's; its other parts are counted only where
    `read_model` finds the weights.

    Raises: ConfigError.
    """
    text = config.get("text_config")
    inner = {**text} if isinstance(text, Mapping) else {**config}
    family = str(inner.get("model_type", config.get("model_type", "?")))
    rules = _FAMILIES.get(family)
    shape = _shape(inner, family, rules or {})
    if rules is None:
        return replace(shape, counted=_counted_by_transformers({**config}, family))
    return shape


def _from_hub(name: str) -> Path:
    """The config.json of a model on the hub, or in its cache. Raises: ConfigError."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise ConfigError(
            f"there is no {name} here, and no huggingface_hub to ask for it: "
            "pip install 'engram-store[hf]', or name a directory"
        ) from error
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"there is no {name} here, nor can it be had from the hub: {reason}"
        ) from error


def _shape(config: Mapping[str, Any], family: str, rules: Mapping[str, Any]) -> ModelShape:
    """Raises: ConfigError: a size is missing."""
    experts = config.get("num_experts_per_tok") or 1
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        inner = config.get("intermediate_size") or config["moe_intermediate_size"]
        if experts > 1:  # what one token passes through
            inner = experts * (config.get("moe_intermediate_size") or inner)
        attention = bool(config.get(rules.get("biases", ""), False))
        return ModelShape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or rules.get("head_dim") or hidden // heads,
            intermediate=inner,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", rules.get("tied", False))),
            family=family,
            qkv_bias=rules.get("qkv_bias", attention),
            output_bias=attention and rules.get("output_bias", False),
            mlp_bias=bool(config.get("mlp_bias")) and rules.get("mlp_bias", False),
            qk_norm=rules.get("qk_norm", False),
            layer_norms=rules.get("layer_norms", 2),
            norms_in_fp32=family.startswith("gemma"),
            softcapped=config.get("attn_logit_softcapping") is not None,
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"the config of family {family!r} names no language model's sizes ({error!r}); give "
            "them by --sizes"
        ) from error


def _counted_by_transformers(config: dict[str, Any], family: str) -> int:
    """Parameters of a model that is built without memory. Raises: ConfigError."""
    known = ", ".join(_FAMILIES)
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            made = AutoConfig.for_model(config.pop("model_type"), **config)
            model = AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
    except (ImportError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"a model of family {family!r} cannot be counted here: {error}. Known without "
            f"transformers are {known}; give the sizes by --sizes, with counted=PARAMETERS"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _stored_parameters(directory: Path) -> int | None:
    """Values in a directory's safetensors files, from their headers alone; None: there are none.

    Raises: ConfigError: a file is damaged.
    """
    files = sorted(directory.glob("model*.safetensors"))
    total = 0
    for file in files:
        try:
            with file.open("rb") as data:
                length = int.from_bytes(data.read(8), "little")
                header = json.loads(data.read(length) if length < 100 << 20 else b"")
            tensors = [v for k, v in header.items() if k != "__metadata__"]
            if any(not str(t["dtype"]).startswith(("F", "BF")) for t in tensors):
                return None  # quantised: values are packed, so the files tell no count
            total += sum(math.prod(tensor["shape"]) for tensor in tensors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is no complete safetensors file: {error!r}") from error
    return total if files else None
