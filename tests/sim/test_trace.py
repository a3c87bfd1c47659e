"""What traces say of datagrams, and the diagrams drawn of them."""

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.sim.loop import VirtualLoop
from p2pvpn.sim.trace import Trace, TraceEvent, describe, diagram


def ike(exchange, flags, message):
    return bytes(4) + bytes(16) + bytes([46, 0x20, exchange, flags]) + message.to_bytes(4, "big") + bytes(4)


def test_datagrams_are_described_from_their_outside():
    assert describe(ike(34, 0x08, 0)) == "IKE_SA_INIT request 0"
    assert describe(ike(43, 0x20, 1)) == "IKE_INTERMEDIATE response 1"
    assert describe(ike(99, 0, 7)) == "exchange 99 request 7"
    assert describe(b"\xc0\0\0\1" + bytes(40)) == "ESP"
    assert describe(b"\xff") == "keepalive"
    assert describe(b"who knows") == "other"
    assert describe(bytes(8)) == "ike"
    transaction = bytes(12)
    assert describe(stun.build(stun.request(transaction))) == "STUN request"
    assert describe(stun.build(stun.indication(transaction))) == "STUN indication"
    assert describe(stun.build(stun.success(transaction, Endpoint("192.0.2.1", 1)))) == "STUN response"
    assert describe(stun.build(stun.error(transaction, 400, "Bad Request"))) == "STUN error"


def test_a_diagram_draws_arrows_between_columns_and_remarks_beside_them():
    events = [
        TraceEvent(0.0, "a", "IKE_SA_INIT request 0", "", "b"),
        TraceEvent(0.1, "b", "IKE_SA_INIT response 0", "", "a"),
        TraceEvent(0.2, "a", "ESP", "", "c"),
        TraceEvent(0.3, "a", "ESP", "", "c"),
        TraceEvent(0.4, "a", "connected", "direct"),
        TraceEvent(0.5, "b", "STUN request", "(filtered)", "b"),
        TraceEvent(0.6, "a", "ESP", "(lost)", "b"),
        TraceEvent(0.7, "stranger", "ESP", "", "b"),
        TraceEvent(0.8, "b", "noise", "unwanted"),
    ]
    assert diagram(events, ["a", "b", "c"], skip=["noise"]).splitlines() == [
        "           a                               b                               c",
        "  0.000000 |--- IKE_SA_INIT request 0 ---->|                               |",
        "  0.100000 |<--- IKE_SA_INIT response 0 ---|                               |",
        "  0.200000 |--------------------------- ESP x2 --------------------------->|",
        "  0.400000 |                               |                               |  a: connected direct",
        "  0.500000 |                               |                               |  * b: STUN request (filtered)",
        "  0.600000 |--------- ESP (lost) ---------x|                               |",
    ]


def test_a_label_that_does_not_fit_stands_beside_its_arrow():
    events = [TraceEvent(0.0, "b", "a kind whose name is too long for a column", "", "a")]
    assert diagram(events, ["a", "b"]).splitlines()[1].endswith("|<------------------------------|  " + events[0].kind)


def test_a_trace_notes_the_virtual_time():
    loop = VirtualLoop()
    trace = Trace(loop)
    trace.note("a", "started")
    trace.note("a", "said", "hello")
    loop.close()
    assert trace.lines() == ["   0.000000  a: started", "   0.000000  a: said hello"]
