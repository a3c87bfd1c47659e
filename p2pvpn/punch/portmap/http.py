"""As much of HTTP/1.1 as a router's UPnP service needs: one request and its answer per connection (RFC 9112)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from p2pvpn.core.errors import WireError

MAX_HEAD_BYTES = 4096
MAX_BODY_BYTES = 65536
MAX_ANSWER_BYTES = MAX_HEAD_BYTES + 2 * MAX_BODY_BYTES
"""On the wire, with the framing of chunks."""
MAX_URL = 512
_URL = re.compile(r"http://([0-9.]{7,15})(?::([0-9]{1,5}))?(/[!-~]*)?")
_PATH = re.compile(r"[!-~]+")
_STATUS = re.compile(r"HTTP/1\.[01] ([0-9]{3})(?: |$)")


@dataclass(frozen=True, slots=True)
class Url:
    """Of a service on an IPv4 address; routers name no others."""

    host: str
    port: int
    path: str

    @classmethod
    def parse_untrusted(cls, text: str) -> Url:
        """Raises WireError."""
        found = _URL.fullmatch(text) if len(text) <= MAX_URL else None
        if found is None:
            raise WireError(f"{text[:60]!r} is no URL of a router")
        try:
            host = str(IPv4Address(found[1]))
        except ValueError:
            raise WireError(f"{found[1]!r} is no address") from None
        port = int(found[2] or 80)
        if not 0 < port < 65536:
            raise WireError(f"{port} is no port")
        return cls(host, port, found[3] or "/")

    def join_untrusted(self, reference: str) -> Url:
        """Where a reference in a document from here leads: an absolute URL, or a path. Raises WireError."""
        if reference.startswith("http://"):
            return Url.parse_untrusted(reference)
        if not _PATH.fullmatch(reference) or len(reference) > MAX_URL or "://" in reference:
            raise WireError(f"{reference[:60]!r} is no path")
        if reference.startswith("/"):
            return Url(self.host, self.port, reference)
        return Url(self.host, self.port, self.path.rpartition("/")[0] + "/" + reference)


@dataclass(frozen=True, slots=True)
class Answer:
    """`headers` by lower-case name; of several of one name the last."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def request(method: str, url: Url, headers: dict[str, str] | None = None, body: bytes = b"") -> bytes:
    """The bytes of a request after whose answer the server closes."""
    lines = [f"{method} {url.path} HTTP/1.1", f"Host: {url.host}:{url.port}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def is_complete_untrusted(data: bytes) -> bool:
    """Whether all of an answer is here, as far as its head says how long it is: some servers do not close."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return False
    try:
        _, headers = parse_head_untrusted(head)
        length = _length_untrusted(headers)
    except WireError:
        return True  # The rest will not make it any better.
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return body.endswith(b"0\r\n\r\n")
    return length is not None and len(body) >= length


def parse_answer_untrusted(data: bytes) -> Answer:
    """A whole answer, as it was when the server closed. Raises WireError."""
    if len(data) > MAX_ANSWER_BYTES:
        raise WireError(f"{len(data)} bytes of HTTP")
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        raise WireError("an answer without an end of its head")
    status, headers = parse_head_untrusted(head)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _joined_untrusted(body)
    else:
        length = _length_untrusted(headers)
        if length is not None:
            if len(body) < length:
                raise WireError("half an answer")
            body = body[:length]
    if len(body) > MAX_BODY_BYTES:
        raise WireError(f"{len(body)} bytes of HTTP body")
    return Answer(status, body, headers)


def parse_head_untrusted(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers. Raises WireError."""
    if len(head) > MAX_HEAD_BYTES:
        raise WireError(f"{len(head)} bytes of HTTP head")
    first, *lines = head.decode("latin-1").split("\r\n")
    found = _STATUS.match(first)
    if found is None:
        raise WireError("not an HTTP answer")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return int(found[1]), headers


def _length_untrusted(headers: dict[str, str]) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise WireError("a bad Content-Length")
    return int(text)


def _joined_untrusted(body: bytes) -> bytes:
    """The content of chunks (RFC 9112 section 7.1)."""
    content = b""
    while True:
        size, end, body = body.partition(b"\r\n")
        digits = size.partition(b";")[0].strip()
        if not end or not 1 <= len(digits) <= 5 or not re.fullmatch(rb"[0-9a-fA-F]+", digits):
            raise WireError("a bad chunk")
        length = int(digits, 16)
        if not length:
            return content
        content += body[:length]
        if len(body) < length + 2 or len(content) > MAX_BODY_BYTES:
            raise WireError("half a chunk, or too many")
        body = body[length + 2 :]
