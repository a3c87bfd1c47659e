"""Redirection to another gateway (RFC 5685): what the notification carries.

    REDIRECT:        | type u8 | length u8 | identity | nonce of IKE_SA_INIT, else nothing |
    REDIRECTED_FROM: | type u8 | length u8 | identity |

Gateways are named by address here; a name would have to be looked up, so it goes to the engine like everything that is
not part of IKE_SA_INIT. An attempt follows few redirections, so that two gateways cannot play ball with a client.
"""

from __future__ import annotations

import ipaddress

from p2pvpn.core.address import Endpoint, IpAddress
from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader

from .notifies import Notify, NotifyType

MAX_REDIRECTS = 5
"""Of one attempt (RFC 5685 section 3 suggests 5 in 300 s)."""
_TYPES = {4: 1, 6: 2}
_SIZES = {1: 4, 2: 16}


def redirect_notify(gateway: IpAddress, nonce: bytes = b"") -> Notify:
    """To that gateway; with the initiator's nonce in the answer to IKE_SA_INIT."""
    return Notify(NotifyType.REDIRECT, _identity(gateway) + nonce)


def redirected_from(gateway: Endpoint) -> Notify:
    """Said to the new gateway."""
    return Notify(NotifyType.REDIRECTED_FROM, _identity(gateway.ip))


def parse_redirect_untrusted(data: bytes) -> tuple[IpAddress, bytes]:
    """The gateway's address, and the nonce. Raises WireError, also for a gateway that has a name only."""
    reader = Reader(data)
    kind, size = reader.u8(), reader.u8()
    identity = reader.take(size)
    if _SIZES.get(kind) != size:
        raise WireError("a gateway that is not named by its address")
    return ipaddress.ip_address(identity), reader.rest()


def _identity(gateway: IpAddress) -> bytes:
    return bytes([_TYPES[gateway.version], len(gateway.packed)]) + gateway.packed
