"""The way to a real card and back. Skipped where there is none."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import engram_store
from engram_store.recipes import Recipe, engram
from engram_store.types import RowDtype
from engram_store_client import Memory, attach
from engram_store_client.devices.host_memory import HostMemory, host_memory_of
from engram_store_client.devices.registrar import PinError
from engram_store_client.transport import connect
from tests.unit.client.tiny import VOCABULARY, llama, loss_of, make_tokens, scramble

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAGE = 4096
LAYERS, STEPS = (0, 2), 4


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return engram(
        token_map=np.arange(VOCABULARY), layers=LAYERS, rows_per_head=31, heads=2, pad_id=0
    )


@pytest.fixture
def make(tmp_path: Path, recipe: Recipe) -> Callable[[str], Path]:
    """Stores of the same random rows."""

    def make(name: str) -> Path:
        path = tmp_path / f"{name}.engram"
        engram_store.create(path, recipe, dim=4, initial=engram_store.Normal(std=0.5))
        return path

    return make


@pytest.fixture(autouse=True)
def same_sums() -> Iterator[None]:
    """Kernels that add in one order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def test_buffers_are_pinned_and_let_go(device: torch.device) -> None:
    """As torch sees it."""
    from engram_store_client.devices.cuda_registrar import CudaRegistrar

    memory = HostMemory()
    memory.pin(CudaRegistrar(device))
    buffer = memory.allocate(1 << 20)
    buffer[:] = 7

    assert memory.is_pinned(buffer)
    assert torch.from_numpy(buffer).is_pinned()
    there = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    there.copy_(torch.from_numpy(buffer), non_blocking=True)
    assert int(there.sum()) == 7 << 20
    del buffer
    assert memory.pinned_bytes == 0


def test_a_failed_registration_leaves_no_error_behind(device: torch.device) -> None:
    """The next kernel is as good as any."""
    from engram_store_client.devices.cuda_registrar import CudaRegistrar

    with pytest.raises(PinError):
        CudaRegistrar(device).register(1 << 46, PAGE, read_only=False)

    assert int(torch.ones(3, device=device).sum()) == 3


def trained(path: Path, device: torch.device, steps: int = STEPS) -> tuple[dict[int, bytes], Any]:
    """Tables after some steps with accumulation, checkpointing and an evaluation."""
    with connect(path) as session:
        model: Any = llama().to(device)
        memory = attach(model, session)
        scramble(memory)
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        for step in range(steps):
            losses = [part_loss(model, memory, 2 * step + part, device) for part in range(2)]
            for loss in reversed(losses):
                loss.backward()
            model.eval()
            with torch.inference_mode():
                loss_of(model, make_tokens(batch=3, seed=step).to(device))
            model.train()
            memory.commit(step, lr=0.1)
        transfers = memory.transfers()
        memory.detach()
        with session.announce(make_tokens(batch=40).numpy()) as window:
            return {n: window.rows(n)[0].tobytes() for n in LAYERS}, transfers


def part_loss(model: nn.Module, _memory: Memory, seed: int, device: torch.device) -> Any:
    return loss_of(model.train(), make_tokens(seed=seed).to(device))


def test_training_gives_the_bits_of_plain_copies(
    make: Callable[[str], Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, transfers = trained(make("beside"), device)
    assert transfers.copies > 0
    assert transfers.pageable_copies == 0
    assert transfers.pinned_bytes > 0

    monkeypatch.setattr("engram_store_client.devices.copies.open_streams", lambda _device: None)
    plain, transfers = trained(make("plain"), device)

    assert beside == plain
    assert transfers.copies == 0


def test_a_slot_is_held_while_the_card_reads_it(
    make: Callable[[str], Path], device: torch.device
) -> None:
    """The copy waits on its stream; releasing the window does not wait for it."""
    from engram_store_client.devices.copies import Copies
    from engram_store_client.devices.cuda_streams import CudaStreams
    from engram_store_client.rows import WindowRows

    with connect(make("a")) as session:
        copies = Copies(session)
        path = copies.path(device)
        assert path is not None
        assert isinstance(path.streams, CudaStreams)
        assert host_memory_of(session) is not None
        window = session.announce(make_tokens().numpy())
        expected = torch.from_numpy(window.rows(0)[0].view(np.int16).copy())
        assert session.tables[0].dtype is RowDtype.BFLOAT16
        rows = WindowRows(window, session.tables, step=None, copies=copies)
        with torch.cuda.stream(path.streams._in):
            torch.cuda._sleep(1 << 30)  # type: ignore[no-untyped-call]
        rows.prefetch(0, device)
        upload = rows._uploads[0][1]

        rows.close()
        copies.poll()
        assert copies.transfers().late_releases == 1
        assert not upload.event.done()
        copies.drain()

        there = upload.buffer.rows[: upload.n].view(torch.int16).cpu()
        assert torch.equal(there, expected)


def test_addresses_and_memory_of_the_card_do_not_grow(
    make: Callable[[str], Path], device: torch.device
) -> None:
    """More steps take no more of it."""
    few, many = (trained(make(f"{n}"), device, n)[1] for n in (2, 6))

    assert few.device_bytes == many.device_bytes
