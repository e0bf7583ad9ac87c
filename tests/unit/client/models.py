"""Tiny random models of every kind that a memory attaches to: three decoder layers each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from tests.unit.client.tiny import SIZES, llama, qwen3

IMAGE = 49
"""Token id that stands for a piece of an image."""
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_PLAIN: dict[str, Any] = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**_PLAIN, n_embd=32, n_layer=3, n_head=2, n_positions=64))


def _gpt_neox() -> nn.Module:
    config = GPTNeoXConfig(
        **_PLAIN,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
    )
    return GPTNeoXForCausalLM(config)


def _opt() -> nn.Module:
    config = OPTConfig(
        **_PLAIN,
        pad_token_id=None,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        ffn_dim=48,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return OPTForCausalLM(config)


def llava() -> nn.Module:
    """A vision tower (CLIP) beside a Llama."""
    options: dict[str, Any] = {"image_token_id": IMAGE}  # a name that the class hides from mypy
    config = LlavaConfig(
        **options,
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=16).to_dict(),
        text_config=LlamaConfig(**SIZES).to_dict(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def _gemma3_multimodal() -> nn.Module:
    options: dict[str, Any] = {"image_token_id": IMAGE, "boi_token_id": 47, "eoi_token_id": 48}
    config = Gemma3Config(
        **options,
        vision_config=SiglipVisionConfig(**_VISION).to_dict(),
        text_config=Gemma3TextConfig(**SIZES, head_dim=16).to_dict(),
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def _qwen25_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    config = Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 8,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=48,
        vision_start_token_id=46,
        vision_end_token_id=47,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


TEXT: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": qwen3,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16)),
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
    "opt": _opt,
}
MULTIMODAL: dict[str, Callable[[], nn.Module]] = {
    "llava": llava,
    "gemma3-multimodal": _gemma3_multimodal,
    "qwen2.5-vl": _qwen25_vl,
}


def make(name: str) -> nn.Module:
    """A model of a kind, with the same random weights every time."""
    torch.manual_seed(0)
    return (TEXT | MULTIMODAL)[name]()


def flags(model: nn.Module) -> dict[str, bool]:
    """Which parameters are trained."""
    return {name: p.requires_grad for name, p in model.named_parameters()}


def shape_of(model: nn.Module) -> tuple[Any, ...]:
    """All that attaching could change of a model, but for the content of its weights."""
    hooks = (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_backward_hooks",
        "_forward_pre_hooks_with_kwargs",
    )
    return (
        flags(model),
        [(name, type(module)) for name, module in model.named_modules()],
        [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        sorted(model.state_dict()),
        [sorted(vars(module)) for module in model.modules()],
    )


def logits(model: nn.Module, tokens: Tensor, **inputs: Any) -> Tensor:
    """Of an evaluation pass."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, **inputs).logits
    model.train(training)
    return found
