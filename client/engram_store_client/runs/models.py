"""The base model and its tokenizer, as a run's file names them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engram_store.errors import ConfigError
from engram_store_client.runs.settings import LoraSettings, ModelSettings


def load_tokenizer(settings: ModelSettings) -> Any:
    """The tokenizer, with a padding token. Raises: ConfigError."""
    from transformers import AutoTokenizer

    name = settings.tokenizer or _directory(settings.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot load a tokenizer from {name}: {error}; set model.tokenizer"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: ModelSettings, device: torch.device, seed: int) -> nn.Module:
    """The base on its device, with random weights if so it was asked.

    Raises: ConfigError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = _directory(settings.path)
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if settings.attention is not None:
        options["attn_implementation"] = settings.attention
    try:
        if settings.random_weights:
            torch.manual_seed(seed)
            with device:
                config = AutoConfig.from_pretrained(name)
                model = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
        else:
            if settings.quantization != "none":
                options["quantization_config"] = _quantization(settings)
            options["device_map"] = {"": device}
            model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"cannot load the model {settings.path}: {error}") from error
    model.config.use_cache = False
    assert isinstance(model, nn.Module)
    return model


def _directory(path: str) -> str:
    """A config.json stands for its directory."""
    return str(Path(path).parent) if Path(path).is_file() else path


def _quantization(settings: ModelSettings) -> Any:
    from transformers import BitsAndBytesConfig

    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )


def add_lora(
    model: nn.Module, settings: LoraSettings, *, quantised: bool, checkpointing: bool
) -> Any:
    """The model with LoRA, by peft. Raises: ConfigError."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise ConfigError("lora needs peft: pip install peft") from error
    if quantised:
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=checkpointing
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"this model cannot get LoRA: {error}") from error
