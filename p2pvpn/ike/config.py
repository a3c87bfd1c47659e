"""What an endpoint is told: identities, credentials, what to negotiate, and its limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pvpn.core.address import Endpoint, IpAddress, Path
from p2pvpn.core.child import CBC_SUITES, COMBINED_SUITES, EspSuite
from p2pvpn.core.ports import Entropy
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.crypto.prf import Prf
from p2pvpn.crypto.signatures import PublicKey, Scheme

from .codes import IdKind
from .keylog import KeySink
from .lease import Lease
from .notifies import Notify
from .proposals import IkeCipher


@dataclass(frozen=True, slots=True)
class IkeId:
    """An identity as ID payloads carry it: ID type and content (RFC 7296 section 3.5)."""

    kind: int
    data: bytes

    @classmethod
    def address(cls, address: IpAddress | str) -> IkeId:
        """ID_IPV4_ADDR or ID_IPV6_ADDR. Raises ValueError."""
        ip = ipaddress.ip_address(str(address))
        return cls(IdKind.IPV6_ADDR if ip.version == 6 else IdKind.IPV4_ADDR, ip.packed)

    @classmethod
    def fqdn(cls, name: str) -> IkeId:
        """ID_FQDN. Raises ValueError for a name that is not ASCII."""
        return cls(IdKind.FQDN, name.encode("ascii"))

    @classmethod
    def key_id(cls, data: bytes) -> IkeId:
        """ID_KEY_ID: opaque bytes."""
        return cls(IdKind.KEY_ID, data)

    def __str__(self) -> str:
        if (self.kind, len(self.data)) in ((IdKind.IPV4_ADDR, 4), (IdKind.IPV6_ADDR, 16)):
            return str(ipaddress.ip_address(self.data))
        if self.kind in (IdKind.FQDN, IdKind.RFC822_ADDR):
            # Whatever a stranger puts into a name, nothing but printable ASCII gets into a log.
            return ascii(self.data.decode("latin-1"))[1:-1]
        return f"{self.kind}:{self.data.hex()}"


@dataclass(frozen=True)
class RemoteIdentity:
    """A peer whose certificate chain was verified (its possession of the key is IKE's part).

    `blocks` are the addresses it may have in its side's selectors; `subject` is the verifier's own and goes up unread.
    `key` is None when the credential is a shared secret.
    """

    id: IkeId
    key: PublicKey | None
    blocks: tuple[Selector, ...]
    subject: object = None


def _no_notifies() -> tuple[Notify, ...]:
    return ()


@dataclass(frozen=True)
class Credential:
    """How we prove who we are in one network, and how we check the others.

    `network` labels its Child SAs and events. `certificates` are DER, leaf first; empty with `psk`. `authorities` are
    SHA-1 hashes of the SubjectPublicKeyInfo of the authorities we accept, for CERTREQ. `verify` turns the peer's ID and
    its certificates (none with `psk`) into an identity and raises TrustError or WireError; it also matches the ID
    against the certificate. `auth_notifies` gives status notifications to add to our IKE_AUTH message, in either role.
    """

    network: str
    local_id: IkeId
    certificates: tuple[bytes, ...]
    schemes: tuple[Scheme, ...]
    sign: Callable[[Scheme, bytes], bytes]
    authorities: tuple[bytes, ...]
    verify: Callable[[IkeId, tuple[bytes, ...]], RemoteIdentity]
    local_blocks: tuple[Selector, ...]
    psk: Secret | None = None
    ppk: tuple[bytes, Secret] | None = None
    """The name of a postquantum preshared key and the key (RFC 8784); mixed in when the peer has it too."""
    ppk_required: bool = False
    """Nobody without that key."""
    lease: Callable[[RemoteIdentity], Lease | None] | None = None
    """What a client that asks for addresses gets; None when there is none left."""
    auth_notifies: Callable[[], tuple[Notify, ...]] = _no_notifies


@dataclass(frozen=True)
class Initiate:
    """A new IKE SA to begin: as whom, over which path, with whom, for which traffic.

    `remote_id` is sent as IDr and insisted on; None accepts whoever the credential's `verify` accepts. `childless`
    makes no Child SA (RFC 6023). `tag` comes back in events.
    """

    credential: Credential
    path: Path
    remote_id: IkeId | None
    local: tuple[Selector, ...] = ()
    remote: tuple[Selector, ...] = ()
    childless: bool = False
    tag: object = None
    initial_contact: bool = False
    """Say that we know of no other SA with this peer: it forgets the others of the same two identities."""
    request_lease: bool = False
    """Ask for addresses; SaEstablished has what was given."""
    transport: bool = False
    """Ask for transport mode, between the two ends of the path; a peer may make it tunnel mode."""


def _never(_endpoint: Endpoint) -> bool:
    return False


@dataclass(frozen=True)
class IkeSettings:
    """What is negotiated, and every limit and interval with its reason. Times are seconds, sizes bytes."""

    ciphers: tuple[IkeCipher, ...] = COMBINED_SUITES
    accepted_ciphers: tuple[IkeCipher, ...] = CBC_SUITES
    """Taken when a peer offers none of `ciphers`, and never offered: some prefer them to better ones."""
    prfs: tuple[Prf, ...] = (Prf.HMAC_SHA2_384, Prf.HMAC_SHA2_256, Prf.HMAC_SHA2_512)
    kexes: tuple[KexMethod, ...] = (
        KexMethod.CURVE25519,
        KexMethod.ECP_256,
        KexMethod.ECP_384,
        KexMethod.ECP_521,
        KexMethod.MODP_3072,
        KexMethod.MODP_2048,
        KexMethod.MODP_4096,
    )
    """The first is the one whose public value goes into the first IKE_SA_INIT; the last three are for old clients."""
    additional_kexes: tuple[tuple[KexMethod, ...], ...] = ((KexMethod.ML_KEM_768,),)
    """Key exchanges after the first, offered when an IKE SA is made or rekeyed, each with its alternatives (RFC 9370).

    A peer that does not know them gets an SA without. Empty for never.
    """
    additional_required: bool = False
    """No IKE SA without an additional key exchange."""
    child_kexes: tuple[KexMethod, ...] = (KexMethod.CURVE25519, KexMethod.ECP_256, KexMethod.ECP_384)
    """For fresh keys of Child SAs after the first; a peer may do without."""
    child_additional_kexes: tuple[tuple[KexMethod, ...], ...] = ()
    esp_suites: tuple[EspSuite, ...] = COMBINED_SUITES
    accepted_esp_suites: tuple[EspSuite, ...] = CBC_SUITES
    """Taken when a peer offers none of `esp_suites` in a proposal, and never offered: they cost five times as much."""
    esn: bool = True
    """Offer extended sequence numbers, and take them when they are offered."""
    transport_mode: bool = False
    """Take transport mode when a peer asks for it; the plane has to carry it."""
    children_max: int = 16
    """Child SAs of one IKE SA; twice as many while they are being replaced."""

    retry_s: float = 0.5
    """Before the first retransmission: well above any round trip that is worth using."""
    retry_factor: float = 1.8
    early_s: float = 0.25
    """Before a retransmission that is not counted, while the round trip is unknown; then it follows the round trip."""
    setup_tries: int = 6
    """Transmissions of a request in set-up: gives up after 0.5 (1.8^6 - 1) / 0.8 = 20.6 s."""
    tries: int = 6
    """The same for requests of an established SA."""
    move_tries: int = 4
    """Over the new path of a move, before it falls back: 5.9 s."""
    delete_tries: int = 3
    """Of a DELETE: 3 s; the peer finds out by its own liveness check if all are lost."""
    error_grace_s: float = 2.0
    """How long the true answer is waited for after an unprotected error in answer to IKE_SA_INIT."""
    half_open_s: float = 30.0
    """From IKE_SA_INIT to the end of IKE_AUTH, for the responder."""
    child_linger_s: float = 5.0
    """How long a replaced Child SA still receives what is in flight."""
    later_s: float = 5.0
    """Before something is asked again that the peer could not do just then (RFC 7296 section 2.25)."""
    linger_s: float = 10.0
    """How long an ended SA answers retransmissions of the last request; covers the peer's first five tries."""
    liveness_s: float | None = 30.0
    """Quiet time after which the peer is probed (RFC 7296 section 2.4); None leaves probing to the engine."""
    nat_keepalive_s: float | None = 20.0
    """Between keepalives while we are behind a NAT (RFC 3948 section 4); None for never."""

    cookie_total: int = 30
    """Half-open SAs from which on everybody needs a cookie."""
    cookie_per_source: int = 3
    """Half-open SAs of one source from which on that source needs a cookie."""
    half_open_max: int = 1000
    half_open_per_source: int = 64
    """Many peers may come from one hub's relay or one carrier's NAT."""
    sa_max: int = 20_000
    queue_max: int = 16
    """Requests of one SA that wait for the window of 1."""
    error_answers_per_s: float = 2.0
    """Unprotected errors to one source, so that nobody is flooded by us."""

    fragment_bytes: int = 1232
    """UDP payload of a fragment, non-ESP marker included: an IPv6 packet of 1280 bytes, that every path carries."""
    message_bytes: int = 32768
    """Of a message put together from fragments; a long certificate chain has about 10,000."""
    redirect: Callable[[Path], IpAddress | None] | None = None
    """Where to send a client that begins over a path, None to serve it (RFC 5685)."""
    fake_nat: bool = True
    """Say that we are behind a NAT, so that the peer's ESP comes in UDP (module `nat`)."""
    request_certificates: bool = True
    """Send CERTREQ in the answer to IKE_SA_INIT: many implementations send their certificate only when asked."""
    routable: Callable[[Endpoint], bool] = field(default=_never)
    """Whether an address is known to be the peer's (ICE consent); then MOBIKE needs no COOKIE2 exchange."""

    @property
    def all_ciphers(self) -> tuple[IkeCipher, ...]:
        return self.ciphers + self.accepted_ciphers

    @property
    def all_esp_suites(self) -> tuple[EspSuite, ...]:
        return self.esp_suites + self.accepted_esp_suites

    @property
    def known_additional(self) -> tuple[KexMethod, ...]:
        """Methods that we take as an additional key exchange, the best first."""
        ours = (one for methods in (*self.additional_kexes, *self.child_additional_kexes) for one in methods)
        kems = (one for one in KexMethod if one.is_kem)
        return tuple(dict.fromkeys([*ours, *kems])) if self.additional_kexes else ()


class Local:
    """What all SAs of an endpoint share. `fresh_spi` and `next_sa_id` number IKE SAs."""

    __slots__ = (
        "allocate_spi",
        "credentials",
        "entropy",
        "fresh_spi",
        "key_sink",
        "next_child_id",
        "next_sa_id",
        "settings",
    )

    def __init__(
        self,
        settings: IkeSettings,
        entropy: Entropy,
        next_child_id: Callable[[], int],
        allocate_spi: Callable[[], int],
        *,
        fresh_spi: Callable[[], bytes],
        next_sa_id: Callable[[], int],
        key_sink: KeySink | None = None,
    ) -> None:
        self.settings = settings
        self.entropy = entropy
        self.next_child_id = next_child_id
        self.allocate_spi = allocate_spi
        self.fresh_spi = fresh_spi
        self.next_sa_id = next_sa_id
        self.key_sink = key_sink
        self.credentials: tuple[Credential, ...] = ()
