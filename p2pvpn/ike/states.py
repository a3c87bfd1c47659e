"""The states of an IKE SA, as a literal table: what may happen in each, and what comes of it.

A step is something that has become true: a message was accepted, a command was given, a timer ran out. A step without a
row is an error of ours, never of the peer: what messages a state admits is the second table, and a message that is not
admitted is dropped before any step follows from it.
"""

from __future__ import annotations

from enum import Enum

from p2pvpn.core.errors import LocalError

from .codes import Exchange


class State(Enum):
    INIT_SENT = "our IKE_SA_INIT is on its way"
    INIT_ANSWERED = "the peer's IKE_SA_INIT was answered; nobody is authenticated yet"
    MIXING_SENT = "keys are agreed and an additional key exchange is on its way"
    MIXING_DUE = "the peer's IKE_SA_INIT was answered; additional key exchanges are due"
    AUTH_SENT = "keys are agreed and our IKE_AUTH is on its way"
    ESTABLISHED = "both sides are authenticated"
    DELETING = "our DELETE is on its way"
    LINGERING = "ended; only retransmissions of the last request are answered"
    CLOSED = "forgotten"


class Step(Enum):
    RETRY = "the responder wants a cookie or another group"
    MIX = "IKE_SA_INIT is complete, additional key exchanges follow"
    KEYED = "all key exchanges are complete"
    AUTHENTICATED = "IKE_AUTH is complete"
    REFUSED = "one side does not accept the other"
    UNTRUSTED = "the responder does not prove who it is"
    CLOSE = "we end the SA"
    PEER_CLOSED = "the peer ends the SA"
    BROKEN = "an authenticated message breaks the protocol"
    ANSWERED = "our DELETE was answered"
    TIMED_OUT = "time is up"
    DROPPED = "we forget the SA without a word"


TRANSITIONS: dict[tuple[State, Step], tuple[State, str]] = {
    (State.INIT_SENT, Step.RETRY): (State.INIT_SENT, "Message 0 goes out again, with the cookie or the other group."),
    (State.INIT_SENT, Step.KEYED): (State.AUTH_SENT, "The responder's key share gives the SK_ keys; IKE_AUTH follows."),
    (State.INIT_SENT, Step.MIX): (State.MIXING_SENT, "IKE_INTERMEDIATE carries the next key exchange (RFC 9370)."),
    (State.INIT_SENT, Step.REFUSED): (State.CLOSED, "Only unprotected errors came until the grace time was over."),
    (State.INIT_SENT, Step.TIMED_OUT): (State.CLOSED, "No answer to the last retransmission."),
    (State.INIT_SENT, Step.DROPPED): (State.CLOSED, "The engine no longer wants it."),
    (State.INIT_ANSWERED, Step.AUTHENTICATED): (
        State.ESTABLISHED,
        "The initiator proved who it is; our proof goes out.",
    ),
    (State.INIT_ANSWERED, Step.REFUSED): (State.LINGERING, "AUTHENTICATION_FAILED is kept for its retransmissions."),
    (State.INIT_ANSWERED, Step.BROKEN): (State.LINGERING, "INVALID_SYNTAX is kept for its retransmissions."),
    (State.INIT_ANSWERED, Step.TIMED_OUT): (State.CLOSED, "IKE_AUTH did not come in time."),
    (State.INIT_ANSWERED, Step.DROPPED): (State.CLOSED, "Its place was needed."),
    (State.MIXING_SENT, Step.KEYED): (State.AUTH_SENT, "The last key exchange is mixed in; IKE_AUTH follows."),
    (State.MIXING_SENT, Step.REFUSED): (State.CLOSED, "The responder said, protected, that it cannot go on."),
    (State.MIXING_SENT, Step.TIMED_OUT): (State.CLOSED, "No answer to the last retransmission."),
    (State.MIXING_SENT, Step.DROPPED): (State.CLOSED, "The engine no longer wants it."),
    (State.INIT_ANSWERED, Step.MIX): (State.MIXING_DUE, "The proposal has more key exchanges: IKE_AUTH has to wait."),
    (State.MIXING_DUE, Step.KEYED): (State.INIT_ANSWERED, "The last one is answered: IKE_AUTH may come."),
    (State.MIXING_DUE, Step.REFUSED): (State.LINGERING, "The refusal is kept for its retransmissions."),
    (State.MIXING_DUE, Step.BROKEN): (State.LINGERING, "INVALID_SYNTAX is kept for its retransmissions."),
    (State.MIXING_DUE, Step.TIMED_OUT): (State.CLOSED, "The next key exchange did not come in time."),
    (State.MIXING_DUE, Step.DROPPED): (State.CLOSED, "Its place was needed."),
    (State.AUTH_SENT, Step.AUTHENTICATED): (State.ESTABLISHED, "The responder proved who it is."),
    (State.AUTH_SENT, Step.REFUSED): (State.CLOSED, "The responder said, protected, that it does not accept us."),
    (State.AUTH_SENT, Step.UNTRUSTED): (
        State.DELETING,
        "The responder believes in an SA: it is told that there is none.",
    ),
    (State.AUTH_SENT, Step.TIMED_OUT): (State.CLOSED, "No answer to the last retransmission."),
    (State.AUTH_SENT, Step.DROPPED): (State.CLOSED, "The engine no longer wants it."),
    (State.ESTABLISHED, Step.CLOSE): (State.DELETING, "DELETE goes out; Child SAs receive until it is answered."),
    (State.ESTABLISHED, Step.PEER_CLOSED): (State.LINGERING, "The peer's DELETE is answered, Child SAs are removed."),
    (State.ESTABLISHED, Step.BROKEN): (State.LINGERING, "INVALID_SYNTAX is the last word (RFC 7296 section 2.21.3)."),
    (State.ESTABLISHED, Step.TIMED_OUT): (State.CLOSED, "A request stayed without an answer: the peer is dead."),
    (State.ESTABLISHED, Step.DROPPED): (State.CLOSED, "The engine knows that nobody is there."),
    (State.DELETING, Step.PEER_CLOSED): (State.LINGERING, "Both sides deleted at once; both are answered."),
    (State.DELETING, Step.BROKEN): (State.LINGERING, "It was ending anyway."),
    (State.DELETING, Step.ANSWERED): (State.CLOSED, "The peer knows."),
    (State.DELETING, Step.TIMED_OUT): (State.CLOSED, "The peer does not answer; its liveness check will find out."),
    (State.DELETING, Step.DROPPED): (State.CLOSED, "The engine does not wait."),
    (State.LINGERING, Step.TIMED_OUT): (State.CLOSED, "The peer had time to ask again."),
    (State.LINGERING, Step.DROPPED): (State.CLOSED, "The engine does not wait."),
}

REQUESTS: dict[State, frozenset[Exchange]] = {
    State.INIT_SENT: frozenset(),
    State.INIT_ANSWERED: frozenset({Exchange.IKE_AUTH}),
    State.MIXING_SENT: frozenset(),
    State.MIXING_DUE: frozenset({Exchange.IKE_INTERMEDIATE}),
    State.AUTH_SENT: frozenset(),
    State.ESTABLISHED: frozenset({Exchange.CREATE_CHILD_SA, Exchange.IKE_FOLLOWUP_KE, Exchange.INFORMATIONAL}),
    State.DELETING: frozenset({Exchange.CREATE_CHILD_SA, Exchange.IKE_FOLLOWUP_KE, Exchange.INFORMATIONAL}),
    State.LINGERING: frozenset(),
    State.CLOSED: frozenset(),
}
"""The requests that a state admits. Answers are admitted by the request that waits for them."""


def after(state: State, step: Step) -> State:
    """The state that follows. Raises LocalError when the table has no row."""
    row = TRANSITIONS.get((state, step))
    if row is None:
        raise LocalError(f"{step.name} cannot happen in {state.name}")
    return row[0]
