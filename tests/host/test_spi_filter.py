"""The kernel passes ESP of our SPIs and nothing else, and never loses a packet of a new SA."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from p2pvpn.host.spi_filter import MAX_SPIS, SETTLE_S, SpiFilter, program

MAX_INSTRUCTIONS = 4096


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    host = "127.0.0.1" if request.param == socket.AF_INET else "::1"
    with socket.socket(request.param, socket.SOCK_DGRAM) as receiver:
        receiver.bind((host, 0))
        receiver.setblocking(False)
        with socket.socket(request.param, socket.SOCK_DGRAM) as sender:
            sender.connect(receiver.getsockname())
            yield receiver, sender


def passes(pair: tuple[socket.socket, socket.socket], data: bytes) -> bool:
    receiver, sender = pair
    sender.send(data)
    try:
        return receiver.recv(2048) == data
    except BlockingIOError:
        return False


@pytest.mark.parametrize("count", [0, 1, 4, 5, 17, 300, MAX_SPIS])
def test_only_packets_of_known_spis_reach_the_socket(pair, count: int) -> None:
    now = [0.0]
    draw = random.Random(count)
    spis = {draw.getrandbits(30) | 0xC000_0000 for _ in range(count)}
    spi_filter = SpiFilter([pair[0]], lambda: now[0])
    spi_filter.settle(spis)
    for spi in list(spis)[:50]:
        assert passes(pair, spi.to_bytes(4, "big") + b"packet")
        if spi ^ 1 not in spis:
            assert not passes(pair, (spi ^ 1).to_bytes(4, "big") + b"packet")
    for length in range(4):
        assert not passes(pair, b"\xff" * length)
    assert not passes(pair, b"\xc0\x00\x00\x00")


def test_a_new_spi_is_open_from_the_moment_of_its_command(pair) -> None:
    now = [0.0]
    spi_filter = SpiFilter([pair[0]], lambda: now[0])
    assert spi_filter.wait_s() == 0.0
    spi_filter.settle([0xC0000001])
    assert spi_filter.wait_s() is None
    assert not passes(pair, b"\xc0\x00\x00\x02")
    spi_filter.changed(added=True)
    assert passes(pair, b"\xc0\x00\x00\x02")
    assert spi_filter.wait_s() == pytest.approx(SETTLE_S)
    now[0] += SETTLE_S
    spi_filter.settle([0xC0000001, 0xC0000002])
    assert passes(pair, b"\xc0\x00\x00\x02")
    assert not passes(pair, b"\xc0\x00\x00\x03")
    spi_filter.changed(added=False)
    assert not passes(pair, b"\xc0\x00\x00\x03")


def test_too_many_spis_mean_no_filter(pair) -> None:
    spi_filter = SpiFilter([pair[0]], lambda: 0.0)
    spi_filter.settle(range(0xC0000000, 0xC0000000 + MAX_SPIS + 1))
    assert passes(pair, b"\xff\xff\xff\xff")


def test_the_largest_program_is_one_that_the_kernel_takes() -> None:
    assert len(program(range(MAX_SPIS))) <= MAX_INSTRUCTIONS
