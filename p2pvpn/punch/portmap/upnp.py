"""UPnP's Internet Gateway Device, versions 1 and 2: what is asked and answered (UPnP Device Architecture 1.1 sections
1.3, 2.3 and 3.1; WANIPConnection:1, :2 and WANPPPConnection:1).

    M-SEARCH, multicast                      ->  LOCATION of the description, by unicast
    GET description                          ->  XML: services with their control URLs
    POST control URL, SOAP:
        GetExternalIPAddress                 ->  NewExternalIPAddress
        AddAnyPortMapping (version 2)        ->  NewReservedPort
        AddPortMapping                       ->  nothing, or a fault with an error code
        DeletePortMapping

Nothing of it is authenticated, so every URL has to be on the gateway's own address: whoever can pose as the gateway can
do worse than name another port.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address
from xml.sax.saxutils import escape

from p2pvpn.core.errors import RemoteError, WireError

from . import xml
from .http import Answer, Url, parse_head_untrusted

GROUP = "239.255.255.250"
PORT = 1900
"""Of SSDP."""
MAX_SEARCH_ANSWER_BYTES = 2048
SEARCH_WAIT_S = 2
"""MX: devices answer within this time."""
GATEWAY_DEVICES = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
)
_PREFIX = "urn:schemas-upnp-org:service:"
SERVICES = (f"{_PREFIX}WANIPConnection:2", f"{_PREFIX}WANIPConnection:1", f"{_PREFIX}WANPPPConnection:1")
"""Those that map ports, the best first."""
DESCRIPTION = "p2pvpn"
"""What the router's web page calls the mapping."""


class ErrorCode(IntEnum):
    """Those that change what we ask next (WANIPConnection:2 section 2.5)."""

    INVALID_ACTION = 401
    NOT_AUTHORIZED = 606
    NO_SUCH_ENTRY = 714
    CONFLICT = 718
    SAME_PORTS_ONLY = 724
    PERMANENT_ONLY = 725


class UpnpError(RemoteError):
    """The router answered with a fault."""

    def __init__(self, code: int, text: str) -> None:
        said = "".join(letter for letter in text if letter.isprintable())
        super().__init__(f"UPnP error {code} {said}".rstrip())
        self.code = code


@dataclass(frozen=True, slots=True)
class Service:
    """A service that maps ports."""

    kind: str
    control: Url

    @property
    def can_choose(self) -> bool:
        """Whether the router can choose the external port: AddAnyPortMapping came with version 2."""
        return self.kind == SERVICES[0]


def search(device: str) -> bytes:
    """Who is a device of this kind?"""
    lines = (
        "M-SEARCH * HTTP/1.1",
        f"HOST: {GROUP}:{PORT}",
        'MAN: "ssdp:discover"',
        f"MX: {SEARCH_WAIT_S}",
        f"ST: {device}",
        "",
        "",
    )
    return "\r\n".join(lines).encode("ascii")


def parse_search_answer_untrusted(data: bytes, gateway: str) -> Url:
    """Where the gateway's description is. Raises WireError, for another device's as well."""
    if len(data) > MAX_SEARCH_ANSWER_BYTES:
        raise WireError(f"{len(data)} bytes of SSDP")
    status, headers = parse_head_untrusted(data.partition(b"\r\n\r\n")[0])
    if status != 200 or headers.get("st") not in GATEWAY_DEVICES:
        raise WireError("not the answer of a gateway")
    return on_gateway_untrusted(Url.parse_untrusted(headers.get("location", "")), gateway)


def on_gateway_untrusted(url: Url, gateway: str) -> Url:
    """Raises WireError when a URL leads elsewhere."""
    if url.host != gateway:
        raise WireError(f"the gateway {gateway} names a URL on {url.host}")
    return url


def parse_description_untrusted(answer: Answer, url: Url, gateway: str) -> Service:
    """The best service that maps ports, of a description that came from `url`. Raises WireError."""
    if answer.status != 200:
        raise WireError(f"HTTP status {answer.status} for the description")
    root = xml.parse_untrusted(answer.body)
    base = root.child("URLBase")
    start = on_gateway_untrusted(Url.parse_untrusted(base), gateway) if base else url
    found: dict[str, Service] = {}
    for element in root.walk():
        kind = element.child("serviceType")
        if element.name == "service" and kind in SERVICES and kind not in found:
            control = start.join_untrusted(element.child("controlURL"))
            found[kind] = Service(kind, on_gateway_untrusted(control, gateway))
    best = next((found[kind] for kind in SERVICES if kind in found), None)
    if best is None:
        raise WireError("the gateway has no service that maps ports")
    return best


def call(service: Service, action: str, arguments: dict[str, str]) -> tuple[dict[str, str], bytes]:
    """Headers and body of the POST that calls an action."""
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in arguments.items())
    body = (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/">'
        f'<s:Body><u:{action} xmlns:u="{service.kind}">{inner}</u:{action}></s:Body></s:Envelope>\r\n'
    )
    headers = {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{service.kind}#{action}"'}
    return headers, body.encode("utf-8")


def parse_result_untrusted(answer: Answer, action: str) -> xml.Element:
    """The element with an action's results. Raises UpnpError for a fault, WireError for nonsense."""
    root = xml.parse_untrusted(answer.body)
    fault = root.find("UPnPError")
    if fault is not None:
        code = fault.child("errorCode")
        if not code.isascii() or not code.isdigit() or len(code) > 5:
            raise WireError("a fault without a code")
        raise UpnpError(int(code), fault.child("errorDescription")[:60])
    result = root.find(f"{action}Response")
    if answer.status != 200 or result is None:
        raise WireError(f"HTTP status {answer.status} without a result of {action}")
    return result


def external_address_untrusted(result: xml.Element) -> str:
    """Of GetExternalIPAddress. Raises WireError."""
    try:
        return str(IPv4Address(result.child("NewExternalIPAddress")))
    except ValueError:
        raise WireError("the gateway knows no external address") from None


def reserved_port_untrusted(result: xml.Element) -> int:
    """Of AddAnyPortMapping. Raises WireError."""
    text = result.child("NewReservedPort")
    if not text.isascii() or not text.isdigit() or len(text) > 5 or not 0 < int(text) < 65536:
        raise WireError("the gateway reserved no port")
    return int(text)


def mapping_arguments(external_port: int, internal_port: int, client: str, lease_s: int) -> dict[str, str]:
    """Arguments of AddPortMapping and AddAnyPortMapping, in the order that the service demands."""
    return {
        "NewRemoteHost": "",
        "NewExternalPort": str(external_port),
        "NewProtocol": "UDP",
        "NewInternalPort": str(internal_port),
        "NewInternalClient": client,
        "NewEnabled": "1",
        "NewPortMappingDescription": DESCRIPTION,
        "NewLeaseDuration": str(lease_s),
    }


def deletion_arguments(external_port: int) -> dict[str, str]:
    """Arguments of DeletePortMapping."""
    return {"NewRemoteHost": "", "NewExternalPort": str(external_port), "NewProtocol": "UDP"}
