"""Is there a captive portal? A hub serves no web pages, so whoever answers HTTP at its address is somebody else.

A portal redirects every request to its own page, or answers 511 (RFC 6585 section 6). A page of its own at the hub's
address counts only if TLS was intercepted too: the owner of a hub may run a web server on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

HTTP_PORT = 80
PROBE_S = 2.0
MAX_ANSWER_BYTES = 4096
MAX_SHOWN_CHARS = 120
"""Of the portal's address, which is a stranger's word."""
REDIRECTS = frozenset((301, 302, 303, 307, 308))
LOG_IN_NEEDED, OK = 511, 200


async def find_portal(host: str, *, intercepted: bool, port: int = HTTP_PORT) -> str | None:
    """Where the portal is, or nothing when there is none."""
    request = f"GET / HTTP/1.1\r\nHost: {f'[{host}]' if ':' in host else host}\r\nConnection: close\r\n\r\n"
    data = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request.encode())
                while b"\r\n\r\n" not in data and len(data) < MAX_ANSWER_BYTES:
                    piece = await reader.read(MAX_ANSWER_BYTES)
                    if not piece:
                        break
                    data += piece
            finally:
                writer.transport.abort()
    return portal_of_untrusted(data, host, intercepted=intercepted)


def portal_of_untrusted(answer: bytes, host: str, *, intercepted: bool) -> str | None:
    """What an HTTP answer at a hub's address says of a portal: its address if it tells, else the hub's."""
    lines = answer[:MAX_ANSWER_BYTES].decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if not words[0].startswith("HTTP/") or len(words) < 2 or not (words[1].isascii() and words[1].isdigit()):
        return None
    status = int(words[1][:3])
    location = next((line.partition(":")[2].strip() for line in lines[1:] if line.lower().startswith("location:")), "")
    if status in REDIRECTS and location:
        try:
            elsewhere = urlsplit(location).hostname not in (None, host)
        except ValueError:
            elsewhere = True
        return _shown(location) if elsewhere or intercepted else None
    if status == LOG_IN_NEEDED or (status == OK and intercepted):
        return f"http://{host}/"
    return None


def _shown(text: str) -> str:
    """Printable ASCII, and not much of it."""
    return "".join(char for char in text if " " < char < "\x7f")[:MAX_SHOWN_CHARS]
