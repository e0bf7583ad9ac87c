"""Tokens to row ids: compression, multipliers, moduli; one module per published recipe."""

from engram_store.recipes.compression import compress_vocabulary
from engram_store.recipes.deepseek import deepseek_v41
from engram_store.recipes.families import NO_TOKEN, Family
from engram_store.recipes.official import engram
from engram_store.recipes.peft import engram_peft
from engram_store.recipes.qwen import qwen_ple
from engram_store.recipes.recipe import LayerHash, Recipe

__all__ = [
    "NO_TOKEN",
    "Family",
    "LayerHash",
    "Recipe",
    "compress_vocabulary",
    "deepseek_v41",
    "engram",
    "engram_peft",
    "qwen_ple",
]
