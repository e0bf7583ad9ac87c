"""Training with `transformers.Trainer`, or any loop around a `DataLoader`, without subclassing it.

Names are loaded on first use: the collator needs no transformers, the callback does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engram_store.errors import ConfigError

if TYPE_CHECKING:
    from engram_store_client.trainer.callback import EngramCallback
    from engram_store_client.trainer.collator import EngramCollator

__all__ = ["EngramCallback", "EngramCollator"]

_HOMES = {"EngramCallback": "callback", "EngramCollator": "collator"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ConfigError(
            "training with transformers.Trainer needs transformers and accelerate: "
            "pip install 'engram-store[trainer]'"
        ) from error
    return value


def __dir__() -> list[str]:
    return __all__
