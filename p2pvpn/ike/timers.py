"""What an IKE SA waits for, a sentence each."""

from __future__ import annotations

from enum import Enum


class Timer(Enum):
    RETRANSMIT = "the request under way is sent again, or given up"
    DOUBT = "an unprotected error came, and no true answer since"
    END = "a half-open, deleting or lingering SA is forgotten"
    LIVENESS = "nothing was heard of the peer for a while: it is probed"
    CHILDREN = "a replaced Child SA has received for long enough"
    LATER = "what the peer could not do before is asked again"
    KEEPALIVE = "the NAT in front of us is about to forget the mapping"
