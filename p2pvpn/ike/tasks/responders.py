"""Who answers which request of the peer, once the SA has keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from p2pvpn.ike.codes import Exchange

from . import auth, create, followup, inform, intermediate
from .task import Received, Reply

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa

RESPONDERS: dict[Exchange, Callable[[IkeSa, Received, float], Reply]] = {
    Exchange.IKE_AUTH: auth.answer,
    Exchange.CREATE_CHILD_SA: create.answer,
    Exchange.INFORMATIONAL: inform.answer,
    Exchange.IKE_INTERMEDIATE: intermediate.answer,
    Exchange.IKE_FOLLOWUP_KE: followup.answer,
}
