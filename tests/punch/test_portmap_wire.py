"""PCP, NAT-PMP and UPnP on the wire: the layouts of the RFCs by hand, and parsers that meet rubbish.

RFC 6887 and RFC 6886 print layouts and no packets; the hex here is written down from those layouts, field by field.
"""

from __future__ import annotations

import ipaddress
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import RemoteError, WireError
from p2pvpn.punch.portmap import http, natpmp, pcp, upnp, xml

NONCE = bytes(range(12))
MAP_REQUEST = bytes.fromhex(
    "02 01 0000 00001c20 00000000000000000000ffffc0a80102"  # version, MAP, reserved, 7200 s, ::ffff:192.168.1.2
    "000102030405060708090a0b 11 000000 1194 1194 00000000000000000000ffff00000000"  # nonce, UDP, 4500, 4500, any
)
MAP_RESPONSE = bytes.fromhex(
    "02 81 00 00 00000e10 00000064 000000000000000000000000"  # version, R + MAP, reserved, success, 3600 s, epoch 100
    "000102030405060708090a0b 11 000000 1194 2ee0 00000000000000000000ffffcb007107"  # ..., 12000, ::ffff:203.0.113.7
)


def test_a_pcp_request_is_laid_out_as_in_rfc_6887() -> None:
    client = ipaddress.ip_address("192.168.1.2")
    assert pcp.map_request(client, NONCE, 4500, 7200, Endpoint("0.0.0.0", 4500)) == MAP_REQUEST
    six = pcp.map_request(ipaddress.ip_address("2001:db8::2"), NONCE, 4500, 0, None)
    assert six[8:24] == ipaddress.ip_address("2001:db8::2").packed
    assert six[4:8] == six[-16:-12] == bytes(4)


def test_a_pcp_answer_is_read_as_in_rfc_6887() -> None:
    answer = pcp.parse_response_untrusted(MAP_RESPONSE)
    assert answer == pcp.Response(1, 0, 3600, 100, NONCE, pcp.UDP, 4500, Endpoint("203.0.113.7", 12000))
    announcement = bytes.fromhex("02 80 00 00 00000000 00000007 000000000000000000000000")
    assert pcp.parse_response_untrusted(announcement) == pcp.Response(0, 0, 0, 7)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAP_REQUEST,
        MAP_RESPONSE[:-1],
        MAP_RESPONSE[:-4],
        b"\x03" + MAP_RESPONSE[1:],
        MAP_RESPONSE + bytes(1100),
    ],
)
def test_what_is_no_pcp_answer_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        pcp.parse_response_untrusted(data)


def test_a_server_of_another_version_is_known_by_its_answer() -> None:
    assert pcp.unsupported_version_untrusted(bytes.fromhex("0080000100000064")) == natpmp.VERSION
    assert pcp.unsupported_version_untrusted(bytes.fromhex("01810001") + bytes(20)) == 1
    assert pcp.unsupported_version_untrusted(MAP_RESPONSE) is None
    assert pcp.unsupported_version_untrusted(bytes.fromhex("0081000200000064")) is None


def test_nat_pmp_is_laid_out_as_in_rfc_6886() -> None:
    assert natpmp.address_request() == bytes.fromhex("0000")
    assert natpmp.map_request(4500, 4500, 7200) == bytes.fromhex("00 01 0000 1194 1194 00001c20")
    address = bytes.fromhex("00 80 0000 00000064 cb007107")
    assert natpmp.parse_response_untrusted(address) == natpmp.AddressResponse(
        0, 100, ipaddress.IPv4Address("203.0.113.7")
    )
    mapped = bytes.fromhex("00 81 0000 00000064 1194 2ee0 00000e10")
    assert natpmp.parse_response_untrusted(mapped) == natpmp.MapResponse(0, 100, 4500, 12000, 3600)
    refused = bytes.fromhex("00 81 0002 00000064")
    assert natpmp.parse_response_untrusted(refused).result == natpmp.Result.NOT_AUTHORIZED


@given(st.binary(max_size=1200))
def test_no_bytes_make_the_packet_parsers_do_anything_but_wire_error(data: bytes) -> None:
    for parse in (pcp.parse_response_untrusted, natpmp.parse_response_untrusted):
        with suppress(WireError):
            parse(data)
    pcp.unsupported_version_untrusted(data)


@given(st.binary(max_size=60))
def test_no_change_of_an_answer_makes_them_do_anything_else_either(noise: bytes) -> None:
    data = bytes(a ^ b for a, b in zip(MAP_RESPONSE, noise.ljust(60, b"\0"), strict=True))
    with suppress(WireError):
        pcp.parse_response_untrusted(data)


# UPnP.

GATEWAY = "192.168.1.1"
FOUND = (
    b"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"LOCATION: http://192.168.1.1:5000/rootDesc.xml\r\nEXT:\r\n\r\n"
)
DESCRIPTION = """<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major></specVersion>%s
<device><deviceList><device><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<controlURL>/ctl/Common</controlURL></service>
<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<controlURL>%s</controlURL></service>
</serviceList></device></deviceList></device></root>"""
HERE = http.Url(GATEWAY, 5000, "/igd/rootDesc.xml")


def described(control: str, base: str = "") -> upnp.Service:
    body = (DESCRIPTION % (f"<URLBase>{base}</URLBase>" if base else "", control)).encode()
    return upnp.parse_description_untrusted(http.Answer(200, body), HERE, GATEWAY)


def test_a_gateway_is_found_by_its_own_answer_only() -> None:
    assert upnp.parse_search_answer_untrusted(FOUND, GATEWAY) == http.Url(GATEWAY, 5000, "/rootDesc.xml")
    for other in (
        FOUND.replace(b"192.168.1.1:5000", b"192.168.1.7:5000"),
        FOUND.replace(b"http://192.168.1.1", b"http://router.example"),
        FOUND.replace(b"http://", b"file://"),
        FOUND.replace(b"http://192.168.1.1:5000", b"http://192.168.1.1@203.0.113.9:5000"),
        FOUND.replace(b"InternetGatewayDevice", b"MediaServer"),
        FOUND.replace(b"200 OK", b"404 Not Found"),
        FOUND.replace(b"EXT:", b"X: " + b"x" * 3000),
    ):
        with pytest.raises(WireError):
            upnp.parse_search_answer_untrusted(other, GATEWAY)


@pytest.mark.parametrize(
    ("control", "base", "path"),
    [
        ("/ctl/IPConn", "", "/ctl/IPConn"),
        ("ctl/IPConn", "", "/igd/ctl/IPConn"),
        ("http://192.168.1.1:5000/ctl/IPConn", "", "/ctl/IPConn"),
        ("ctl", "http://192.168.1.1:80/base/", "/base/ctl"),
    ],
)
def test_the_control_url_is_found_however_it_is_written(control: str, base: str, path: str) -> None:
    service = described(control, base)
    assert (service.kind, service.control.host, service.control.path) == (upnp.SERVICES[1], GATEWAY, path)
    assert not service.can_choose


@pytest.mark.parametrize(
    ("control", "base"),
    [
        ("http://203.0.113.9/ctl", ""),
        ("http://192.168.1.1:99999/ctl", ""),
        ("/ctl", "http://203.0.113.9/"),
        ("//203.0.113.9/ctl evil", ""),
        ("", ""),
        ("/ctl\r\nX-Evil: yes", ""),
    ],
)
def test_no_url_leads_away_from_the_gateway_or_into_the_header(control: str, base: str) -> None:
    with pytest.raises(WireError):
        described(control, base)


@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE lol [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><root>&b;</root>',
        b'<!DOCTYPE root SYSTEM "http://192.168.1.1/x.dtd"><root/>',
        b'<!DOCTYPE root [<!ENTITY x SYSTEM "file:///etc/passwd">]><root>&x;</root>',
        b"<root>&undefined;</root>",
        b"<a>" * 100 + b"</a>" * 100,
        b"<root>" + b"<a/>" * 3000 + b"</root>",
        b"<root>" + b"x" * 5000 + b"</root>",
        b"<root/>" + b" " * 70000,
        b'<?xml version="1.0" encoding="no-such"?><root/>',
        b"<root>",
        b"",
    ],
)
def test_xml_with_entities_or_without_measure_is_refused(document: bytes) -> None:
    with pytest.raises(WireError):
        xml.parse_untrusted(document)


def test_a_soap_call_is_escaped_and_its_answer_read() -> None:
    service = described("/ctl")
    headers, body = upnp.call(service, "AddPortMapping", {"NewPortMappingDescription": "<a&b>"})
    assert headers["SOAPAction"] == '"urn:schemas-upnp-org:service:WANIPConnection:1#AddPortMapping"'
    assert xml.parse_untrusted(body).find("NewPortMappingDescription").text == "<a&b>"  # type: ignore[union-attr]
    answer = http.Answer(
        200,
        b'<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
        b'<u:GetExternalIPAddressResponse xmlns:u="urn:schemas-upnp-org:service:WANIPConnection:1">'
        b"<NewExternalIPAddress>203.0.113.7</NewExternalIPAddress></u:GetExternalIPAddressResponse></s:Body></s:Envelope>",
    )
    result = upnp.parse_result_untrusted(answer, "GetExternalIPAddress")
    assert upnp.external_address_untrusted(result) == "203.0.113.7"
    fault = http.Answer(
        500,
        b'<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault><detail>'
        b'<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>718</errorCode>'
        b"<errorDescription>Conflict\x85\nInMappingEntry</errorDescription></UPnPError></detail></s:Fault></s:Body></s:Envelope>".replace(
            b"\x85", b""
        ),
    )
    with pytest.raises(upnp.UpnpError) as problem:
        upnp.parse_result_untrusted(fault, "AddPortMapping")
    assert problem.value.code == upnp.ErrorCode.CONFLICT
    assert "\n" not in str(problem.value)


def test_http_answers_are_joined_from_chunks_and_bounded() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=1\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    assert http.is_complete_untrusted(chunked)
    assert http.parse_answer_untrusted(chunked).body == b"hello world"
    plain = b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello, and more"
    assert http.parse_answer_untrusted(plain).body == b"hello"
    assert not http.is_complete_untrusted(plain[:-12])
    for bad in (
        b"SSH-2.0-OpenSSH\r\n\r\n",
        plain[:-12],
        chunked.replace(b"5;x=1", b"-5"),
        chunked[:-12],
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(70000),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
    ):
        with pytest.raises(WireError):
            http.parse_answer_untrusted(bad)


@given(st.binary(max_size=600))
def test_no_bytes_make_the_upnp_parsers_do_anything_but_remote_error(data: bytes) -> None:
    http.is_complete_untrusted(data)
    body = http.Answer(200, data)
    for parse in (
        lambda: upnp.parse_search_answer_untrusted(data, GATEWAY),
        lambda: http.parse_answer_untrusted(data),
        lambda: http.parse_answer_untrusted(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data),
        lambda: xml.parse_untrusted(data),
        lambda: upnp.parse_description_untrusted(body, HERE, GATEWAY),
        lambda: upnp.parse_result_untrusted(body, "AddPortMapping"),
    ):
        with suppress(RemoteError):
            parse()


@given(st.text(max_size=80))
def test_no_text_makes_a_url_that_leads_elsewhere(text: str) -> None:
    with suppress(WireError):
        assert http.Url.parse_untrusted(text).host.count(".") == 3
    with suppress(WireError):
        joined = upnp.on_gateway_untrusted(HERE.join_untrusted(text), GATEWAY)
        assert joined.host == GATEWAY
        assert not set(joined.path) & set(" \r\n")
