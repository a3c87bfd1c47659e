"""A UPnP router that lies, babbles or leads elsewhere: it gets no mapping believed, and nothing but its own time."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import RemoteError
from p2pvpn.host.igd import Igd
from p2pvpn.lab.net import Lab
from p2pvpn.punch.portmap import upnp

pytestmark = pytest.mark.netns

ROUTER, LIAR, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"
SERVICE = upnp.SERVICES[1]
DESCRIPTION = (
    f"<root><device><service><serviceType>{SERVICE}</serviceType>"
    "<controlURL>/ctl</controlURL></service></device></root>"
)


def soap(action: str, inner: str = "") -> str:
    body = f'<u:{action}Response xmlns:u="y">{inner}</u:{action}Response>'
    return f'<e:Envelope xmlns:e="x"><e:Body>{body}</e:Body></e:Envelope>'


def http(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def _udp(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((host, port))
    return sock


@dataclass
class Router:
    """Answers by what each request has in it, the first that fits."""

    answers: dict[str, bytes]
    location_host: str = ROUTER
    speaks_from: str = ROUTER
    asked: list[str] = field(default_factory=list)

    async def serve(self, work: Callable[[], Awaitable[object]]) -> None:
        """Serve while `work` runs."""
        loop = asyncio.get_running_loop()
        async with await asyncio.start_server(self._answer, ROUTER, 5000, limit=1 << 20):
            with _udp(ROUTER, upnp.PORT) as ssdp, _udp(self.speaks_from, 0) as mouth:
                loop.add_reader(ssdp, self._found, ssdp, mouth if self.speaks_from != ROUTER else ssdp)
                try:
                    await work()
                finally:
                    loop.remove_reader(ssdp)

    def _found(self, ssdp: socket.socket, mouth: socket.socket) -> None:
        data, source = ssdp.recvfrom(2048)
        device = upnp.GATEWAY_DEVICES[1]
        if device.encode() in data:
            answer = f"HTTP/1.1 200 OK\r\nST: {device}\r\nLOCATION: http://{self.location_host}:5000/d.xml\r\n\r\n"
            mouth.sendto(answer.encode(), source)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.read(1 << 16)).decode()
        self.asked.append(request)
        data = next((answer for word, answer in self.answers.items() if word in request), b"")
        writer.write(data)
        writer.close()


GOOD = {
    "GET /d.xml": http(DESCRIPTION),
    "GetExternalIPAddress": http(
        soap("GetExternalIPAddress", "<NewExternalIPAddress>203.0.113.7</NewExternalIPAddress>")
    ),
    "#AddPortMapping": http(soap("AddPortMapping")),
    "#DeletePortMapping": http(soap("DeletePortMapping")),
}


def mapped(lab: Lab, router: Router) -> Igd:
    """What a client that asks this router has then."""
    igd = Igd(ROUTER, Endpoint(ROUTER, 4500), os.urandom)
    with lab.node("machine").inside():
        asyncio.run(router.serve(igd.map))
    return igd


def test_a_router_that_answers_as_it_should_is_believed(lab: Lab) -> None:
    router = Router(GOOD)
    igd = mapped(lab, router)
    assert igd.mapping is not None
    assert igd.mapping.external == Endpoint("203.0.113.7", 4500)
    assert any("<NewInternalClient>127.0.0.1</NewInternalClient>" in request for request in router.asked)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("GET /d.xml", http("<root/>")),
        ("GET /d.xml", http(DESCRIPTION.replace("/ctl", "http://203.0.113.9/ctl"))),
        ("GET /d.xml", http('<!DOCTYPE a [<!ENTITY b "c">]><root>&b;</root>')),
        ("GET /d.xml", b"HTTP/1.1 200 OK\r\n\r\n" + b"<a>" * 500_000),
        ("GET /d.xml", b""),
        ("GetExternalIPAddress", http(soap("GetExternalIPAddress"))),
        ("GetExternalIPAddress", http("nonsense", "500 No")),
        ("#AddPortMapping", http("<UPnPError><errorCode>606</errorCode></UPnPError>", "500 No")),
        ("#AddPortMapping", http("<UPnPError><errorCode>718</errorCode></UPnPError>", "500 No")),
    ],
)
def test_a_router_that_answers_nonsense_or_no_maps_nothing(lab: Lab, word: str, answer: bytes) -> None:
    with pytest.raises(RemoteError):
        mapped(lab, Router({**GOOD, word: answer}))


def test_a_location_elsewhere_and_answers_of_others_are_not_followed(lab: Lab) -> None:
    for router in (Router(GOOD, location_host=OTHER), Router(GOOD, speaks_from=LIAR)):
        igd = Igd(ROUTER, Endpoint(ROUTER, 4500), os.urandom, search_s=0.2)
        name = f"m{router.location_host[-1]}{router.speaks_from[-1]}"
        with lab.node(name).inside(), pytest.raises(RemoteError, match="does not answer UPnP"):
            asyncio.run(router.serve(igd.map))
        assert router.asked == []


def test_a_private_external_address_is_kept_to_ourselves(lab: Lab) -> None:
    answer = http(soap("GetExternalIPAddress", "<NewExternalIPAddress>10.0.0.7</NewExternalIPAddress>"))
    igd = mapped(lab, Router({**GOOD, "GetExternalIPAddress": answer}))
    assert igd.mapping is not None
    assert not igd.mapping.is_public


def test_a_router_that_takes_only_permanent_leases_or_the_same_port_gets_them(lab: Lab) -> None:
    refusal = http("<UPnPError><errorCode>725</errorCode></UPnPError>", "500 No")
    router = Router({"<NewLeaseDuration>3600<": refusal, **GOOD})
    assert mapped(lab, router).mapping is not None
    assert "<NewLeaseDuration>0<" in router.asked[-1]
