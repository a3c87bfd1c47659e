"""RFC 9329 sections 3 and 4: datagrams in a stream, however it is cut."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.errors import WireError
from p2pvpn.ike.stream import (
    LENGTH_BYTES,
    MAX_DATAGRAM_BYTES,
    PREFIX,
    RELAY_PREFIX,
    FrameReader,
    build_frame,
    build_head,
)

DATAGRAMS = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


@given(st.sampled_from([0, 20_000, 65_535]), DATAGRAMS, st.lists(st.integers(0, 400), max_size=12))
def test_what_goes_in_comes_out_however_the_stream_is_cut(port: int, datagrams: list[bytes], cuts: list[int]) -> None:
    stream = build_head(port) + b"".join(map(build_frame, datagrams))
    reader, out = FrameReader(wants_head=True), []
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    for start, end in itertools.pairwise(places):
        out += reader.feed_untrusted(stream[start:end])
    assert out == datagrams
    assert reader.port == port


def test_a_stream_to_ike_looks_as_the_rfc_says() -> None:
    ike = bytes(4) + b"IKE message"
    assert build_head(0) + build_frame(ike) == b"IKETCP\x00\x11\x00\x00\x00\x00IKE message"


@given(st.binary(max_size=200))
def test_garbage_ends_the_stream_or_waits_for_more(data: bytes) -> None:
    for wants_head in (True, False):
        with contextlib.suppress(WireError):
            for datagram in FrameReader(wants_head=wants_head).feed_untrusted(data):
                assert 1 <= len(datagram) <= len(data)


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\n",
        b"IKETCQ",
        RELAY_PREFIX + b"\0\0",
        PREFIX + b"\0\0",
        PREFIX + b"\0\2",
        PREFIX + b"\xff\xff",
        PREFIX + (MAX_DATAGRAM_BYTES + LENGTH_BYTES + 1).to_bytes(2, "big"),
    ],
)
def test_what_cannot_be_a_stream_is_refused_at_once(stream: bytes) -> None:
    with pytest.raises(WireError):
        FrameReader(wants_head=True).feed_untrusted(stream)


def test_an_unfinished_frame_keeps_no_more_than_its_length() -> None:
    reader = FrameReader(wants_head=False)
    whole = build_frame(bytes(MAX_DATAGRAM_BYTES))
    for start in range(0, len(whole) - 1, 100):
        assert reader.feed_untrusted(whole[start : min(start + 100, len(whole) - 1)]) == []
    assert reader.feed_untrusted(whole[-1:]) == [bytes(MAX_DATAGRAM_BYTES)]
