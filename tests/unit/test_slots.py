"""Shared memory between two processes: what one side can do to the other."""

import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engram_store import slots
from engram_store.errors import ProtocolError
from engram_store.slots import (
    MAX_PACKET_BYTES,
    Slot,
    SlotExchange,
    SlotRange,
    make_slot,
    map_slot,
    peer_uid,
    receive_packet,
    send_slot,
)

LENGTH = 8192
Channels = tuple[socket.socket, socket.socket]


@pytest.fixture
def channels() -> Iterator[Channels]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for channel in pair:
        channel.close()


@pytest.fixture
def made() -> Iterator[tuple[Slot, int]]:
    slot, fd = make_slot(7, LENGTH)
    yield slot, fd
    os.close(fd)


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def plain_memory(length: int = LENGTH, seals: int = 0) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, length)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_what_the_maker_writes_the_other_side_reads(
    channels: Channels, made: tuple[Slot, int]
) -> None:
    """Before and after the slot was handed over, without a copy."""
    ours, fd = made
    ours.bytes[:3] = (1, 2, 3)
    send_slot(channels[0], ours.number, LENGTH, fd)
    theirs = receive_packet(channels[1], LENGTH)
    assert isinstance(theirs, Slot)
    assert theirs.number == 7
    ours.bytes[1] = 9
    np.testing.assert_array_equal(theirs.bytes[:3], (1, 9, 3))


def test_the_other_side_cannot_write_shrink_grow_or_unseal(made: tuple[Slot, int]) -> None:
    """Neither through its mapping nor through the descriptor."""
    _, fd = made
    theirs = map_slot(7, LENGTH, fd)
    assert not theirs.bytes.flags.writeable
    with pytest.raises(PermissionError):
        mmap.mmap(fd, LENGTH)
    for length in (0, LENGTH // 2, 2 * LENGTH):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, length)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


@pytest.mark.parametrize(
    "seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW], ids=["none", "shrink", "grow"]
)
def test_memory_that_can_be_taken_away_is_refused(seals: int) -> None:
    """Truncated under a mapping it would kill the process that reads it."""
    fd = plain_memory(seals=seals)
    with pytest.raises(ProtocolError, match="not sealed against"):
        map_slot(1, LENGTH, fd)
    os.close(fd)


@pytest.mark.parametrize("length", [0, LENGTH - 1, 2 * LENGTH])
def test_a_slot_of_another_length_is_refused(made: tuple[Slot, int], length: int) -> None:
    has = LENGTH + mmap.PAGESIZE
    with pytest.raises(ProtocolError, match=f"has {has} bytes, {length} and a page"):
        map_slot(7, length, made[1])


def test_files_and_pipes_are_no_slots() -> None:
    """Only sealed memory is mapped, whatever a descriptor is."""
    reading, writing = os.pipe()
    with pytest.raises(ProtocolError, match="not sealed memory"):
        map_slot(1, LENGTH, reading)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("message", [b"x", b"x" * 100])
def test_a_descriptor_with_other_bytes_is_refused(
    channels: Channels, made: tuple[Slot, int], message: bytes
) -> None:
    socket.send_fds(channels[0], [message], [made[1]])
    with pytest.raises(ProtocolError, match="are not a slot"):
        receive_packet(channels[1], LENGTH)


def test_messages_come_between_slots_in_order(channels: Channels, made: tuple[Slot, int]) -> None:
    channels[0].send(b"before")
    send_slot(channels[0], 7, LENGTH, made[1])
    channels[0].send(b"x" * MAX_PACKET_BYTES)
    assert receive_packet(channels[1], LENGTH) == b"before"
    assert isinstance(receive_packet(channels[1], LENGTH), Slot)
    assert receive_packet(channels[1], LENGTH) == b"x" * MAX_PACKET_BYTES


def test_a_message_that_is_too_long_is_refused(channels: Channels) -> None:
    channels[0].send(b"x" * (MAX_PACKET_BYTES + 1))
    with pytest.raises(ProtocolError, match="more than 65,536 bytes"):
        receive_packet(channels[1], LENGTH)


def test_a_refused_slot_leaves_no_descriptor_open(channels: Channels) -> None:
    fd = plain_memory()
    send_slot(channels[0], 1, LENGTH, fd)
    before = open_descriptors()
    with pytest.raises(ProtocolError):
        receive_packet(channels[1], LENGTH)
    assert open_descriptors() == before
    os.close(fd)


def test_a_side_that_hangs_up_is_told_from_one_that_sends(channels: Channels) -> None:
    channels[0].close()
    assert receive_packet(channels[1], LENGTH) is None


def test_the_kernel_vouches_for_the_user_at_the_other_end(channels: Channels) -> None:
    assert peer_uid(channels[0]) == os.getuid()


Exchanges = tuple[SlotExchange, SlotExchange]


@pytest.fixture
def exchanges(channels: Channels) -> Iterator[Exchanges]:
    """Two sides; the second one maps what the first sends."""
    sides = SlotExchange(1 << 20), SlotExchange(1 << 20)
    for side, channel in zip(sides, channels, strict=True):
        side.attach(channel)
    receiver = threading.Thread(target=sides[1].receive)
    receiver.start()
    yield sides
    for side in sides:
        side.close()
    receiver.join(5)
    assert not receiver.is_alive()


def test_an_array_within_a_slot_is_found_by_its_range(exchanges: Exchanges) -> None:
    """At its start, in its middle, and read-only for the other side."""
    buffer = exchanges[0].allocate(LENGTH)
    exchanges[0].fill(buffer)
    part = buffer[256:320].view(np.int32)
    part[:] = np.arange(16)
    where = exchanges[0].range_of(part)
    assert (where.slot, where.offset, where.length, where.sequence) == (1, 256, 64, 1)
    seen = exchanges[1].view(where).view(np.int32)
    np.testing.assert_array_equal(seen, np.arange(16))
    assert not seen.flags.writeable


def test_arrays_elsewhere_are_in_no_slot(exchanges: Exchanges) -> None:
    buffer = exchanges[0].allocate(LENGTH)
    assert exchanges[0].holds(buffer[10:])
    assert not exchanges[0].holds(np.zeros(10))
    assert not exchanges[1].holds(buffer)


def test_a_slot_that_was_filled_again_is_not_read_for_the_old_content(
    exchanges: Exchanges,
) -> None:
    buffer = exchanges[0].allocate(LENGTH)
    exchanges[0].fill(buffer)
    old = exchanges[0].range_of(buffer)
    exchanges[1].view(old)
    exchanges[0].fill(buffer)
    with pytest.raises(ProtocolError, match=r"filled 2 times, the message is about content 1"):
        exchanges[1].view(old)


@pytest.mark.parametrize("wanted", [(2, 0, 8), (1, LENGTH, 1), (1, 0, LENGTH + 1)])
def test_a_range_outside_what_was_sent_is_refused(
    exchanges: Exchanges, wanted: tuple[int, int, int]
) -> None:
    """Also when it would reach the page with the sequence."""
    exchanges[0].allocate(LENGTH)
    exchanges[1].view(SlotRange(1, 0, 1, 0))
    exchanges[0].close()
    with pytest.raises(ProtocolError, match="of slot"):
        exchanges[1].view(SlotRange(*wanted, sequence=0))


def test_a_slot_above_the_limit_is_refused_before_it_is_mapped(channels: Channels) -> None:
    """A file of any length costs its sender nothing; a mapping costs us addresses."""
    length = 1 << 50  # beyond what a process can map, so that mapping it would say so
    fd = plain_memory(length + mmap.PAGESIZE, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    send_slot(channels[0], 1, length, fd)
    with pytest.raises(ProtocolError, match="8,192 are left of what"):
        receive_packet(channels[1], LENGTH)
    os.close(fd)


def test_too_many_small_slots_end_the_exchange(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes one of the mappings that a process may have, whatever its length."""
    monkeypatch.setattr(slots, "_MAX_SLOTS", 2)
    ours, theirs = SlotExchange(1 << 20), SlotExchange(1 << 20)
    ours.attach(channels[0])
    theirs.attach(channels[1])
    for _ in range(3):
        ours.allocate(8)
    with pytest.raises(ProtocolError, match="more than 2 slots in one connection"):
        theirs.receive()
    assert not theirs.wait_attached(0)


def test_more_slots_than_allowed_end_the_exchange(channels: Channels) -> None:
    ours, theirs = SlotExchange(1 << 20), SlotExchange(3 * LENGTH)
    ours.attach(channels[0])
    theirs.attach(channels[1])
    for _ in range(4):
        ours.allocate(LENGTH)
    with pytest.raises(ProtocolError, match=r"slot 4 of 8,192 bytes; 0 are left"):
        theirs.receive()
    assert not theirs.wait_attached(0)


def test_posting_never_waits_and_keeps_the_order(channels: Channels) -> None:
    """Ten times what the socket holds, to a side that reads it all later."""
    ours, heard = SlotExchange(1 << 20), list[bytes]()
    theirs = SlotExchange(1 << 20, heard.append)
    ours.attach(channels[0])
    theirs.attach(channels[1])
    sent = [str(number).encode() * 1000 for number in range(3000)]
    for message in sent:
        ours.post(message)
    reader = threading.Thread(target=theirs.receive)
    reader.start()
    while len(heard) < len(sent) and reader.is_alive():
        threading.Event().wait(0.01)
    ours.close()
    reader.join(5)
    assert heard == sent


def test_a_side_that_never_reads_is_given_up(channels: Channels) -> None:
    """After thousands of messages: memory for them is bounded."""
    ours = SlotExchange(1 << 20)
    ours.attach(channels[0])
    posted = 0
    while ours.attached and posted < 20_000:
        ours.post(b"x" * 1000)
        posted += 1
    assert not ours.attached
    assert posted > 4096
