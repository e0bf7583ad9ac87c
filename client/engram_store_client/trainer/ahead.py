"""Batches taken from a loader before they are needed, so that their windows are announced."""

from collections import deque
from collections.abc import Iterator
from typing import Any


class LoaderAhead:
    """A loader, some batches ahead of who iterates over it; in everything else the loader itself.

    Args:
        loader: of torch.
        depth: batches that are held back at any time, at least 1.
    """

    def __init__(self, loader: Any, depth: int) -> None:
        self.loader, self._depth = loader, depth

    def __iter__(self) -> Iterator[Any]:
        """Every batch in its order; an error of the loader comes where its batch would."""
        batches, held = iter(self.loader), deque[Any]()
        error: Exception | None = None
        while error is None:
            try:
                held.append(next(batches))
            except StopIteration:
                break
            except Exception as raised:
                error = raised
            if len(held) > self._depth:
                yield held.popleft()
        while held:
            yield held.popleft()
        if error is not None:
            raise error

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, while an instance is unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)
