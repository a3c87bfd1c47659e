"""The admin's side: creating a network, granting, revoking. It lives on the admin's machine, never on a hub.

    root.pem      the root key, under a passphrase
    recovery.pem  the recovery key, under the same passphrase; to be moved to a safe place, and wanted only for recovery
    network       [kind, genesis, document, ledger]

Every change of hubs, issuers, prefix lengths or revocations makes a new version of the document, which is signed here
and handed to any hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_network
from typing import TypeVar

from p2pvpn.core.address import IpNetwork
from p2pvpn.core.errors import Fault, LocalError, P2pvpnError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.ports import Entropy
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.signatures import PublicKey

from .canonical import Fields, pack
from .certificates import (
    GRANT_LIFETIME_S,
    MEMBER_LIFETIME_S,
    Authority,
    issue_issuer,
    issue_leaf,
    new_serial,
    parse_untrusted,
)
from .document import (
    ENROL_PORT,
    MAX_DOCUMENT_BYTES,
    HubEntry,
    IssuerEntry,
    NetworkDocument,
    Topology,
    prefix_lengths_of,
    split_address,
)
from .genesis import MAX_GENESIS_BYTES, RANGES, Genesis, Root, Succession, ipv4_range, issuer_blocks
from .grants import Grant, Request
from .keys import PeerKey
from .ledger import MAX_ENTRIES, Entry, Ledger, peer_id_of
from .member import Role
from .names import require_name

ROOT_FILE = "root.pem"
RECOVERY_FILE = "recovery.pem"
NETWORK_FILE = "network"
DEFAULT_GROUP = "default"
"""The group of members whom nobody put into another one."""
_KIND = "p2pvpn-admin-1"
MAX_FILE_BYTES = 1 << 26


class AdminNetwork:
    """A network as its admin holds it. Times are in seconds since the epoch."""

    def __init__(
        self,
        genesis: Genesis,
        document: NetworkDocument,
        root_key: PeerKey,
        entropy: Entropy,
        *,
        recovery_key: PeerKey | None = None,
        ledger: Iterable[Entry] = (),
    ) -> None:
        """Raises LocalError when the root key is not the network's."""
        self.genesis = genesis
        self.document = document
        self.recovery_key = recovery_key
        self._root_key = root_key
        self._entropy = entropy
        self._ledger = Ledger(ledger)
        self._root: Root = document.verify(genesis).current
        if root_key.peer_id != self._root.key_id:
            raise LocalError("the root key is not that of the network's current root")

    @classmethod
    def create(cls, name: str, wall: float, entropy: Entropy) -> AdminNetwork:
        """A new network with new root and recovery keys and an empty document. Raises LocalError for a bad name."""
        root, recovery = PeerKey.generate(), PeerKey.generate()
        genesis = Genesis.create(name, root, recovery.public_key, wall=wall, entropy=entropy)
        document = NetworkDocument(genesis.network_id, 1, int(wall)).sign(root)
        return cls(genesis, document, root, entropy, recovery_key=recovery)

    def to_files(self, passphrase: Secret) -> dict[str, bytes]:
        """File names and contents; all of them are for the admin's eyes only."""
        ledger = tuple(entry.encode() for entry in self._ledger.entries)
        files = {
            ROOT_FILE: self._root_key.to_pem(passphrase.reveal()).reveal(),
            NETWORK_FILE: pack((_KIND, self.genesis.encode(), self.document.encode(), ledger)),
        }
        if self.recovery_key is not None:
            files[RECOVERY_FILE] = self.recovery_key.to_pem(passphrase.reveal()).reveal()
        return files

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], passphrase: Secret, entropy: Entropy) -> AdminNetwork:
        """The inverse of `to_files`; the recovery key may be missing. Raises LocalError."""
        for name in (ROOT_FILE, NETWORK_FILE):
            if name not in files:
                raise LocalError(f"the admin's file {name} is missing", fault=Fault.STATE)
        root = PeerKey.from_pem(files[ROOT_FILE], passphrase.reveal())
        recovery = files.get(RECOVERY_FILE)
        try:
            fields = Fields.unpack_untrusted(files[NETWORK_FILE], "the admin's file", MAX_FILE_BYTES)
            fields.kind(_KIND)
            genesis = Genesis.parse_untrusted(fields.raw(MAX_GENESIS_BYTES))
            document = NetworkDocument.parse_untrusted(fields.raw(MAX_DOCUMENT_BYTES))
            ledger = [Entry.parse_untrusted(item) for item in fields.arrays(MAX_ENTRIES)]
            return cls(
                genesis,
                document,
                root,
                entropy,
                recovery_key=None if recovery is None else PeerKey.from_pem(recovery, passphrase.reveal()),
                ledger=ledger,
            )
        except P2pvpnError as problem:
            raise LocalError(f"the admin's files cannot be used: {problem}", fault=Fault.STATE) from None

    @property
    def ledger(self) -> tuple[Entry, ...]:
        """What was granted and not revoked."""
        return self._ledger.entries

    def grant(
        self,
        request: Request,
        *,
        wall: float,
        name: str | None = None,
        hub: str | None = None,
        issuer: bool = False,
        prefixes: Iterable[IpNetwork | str] = (),
        groups: Iterable[str] = (),
        enrol_port: int = ENROL_PORT,
        issuer_group: str = DEFAULT_GROUP,
    ) -> Grant:
        """Certify a machine for a year. Granting the same key again replaces what it had.

        The former certificate is revoked if it says anything that the new one does not.

        `hub` are the public addresses of a hub (`host` or `host:port`, several with commas); `prefixes` make a
        gateway; `issuer` makes a hub certify members into `issuer_group`. Raises LocalError.
        """
        peer = request.peer_id
        name = require_name(name or request.name or self._old_name(peer))
        groups = sorted({require_name(group, "group") for group in groups} or {DEFAULT_GROUP})
        networks = [self._prefix(item) for item in prefixes]
        addresses = tuple(part.strip() for part in hub.split(",")) if hub else ()
        hosts = [split_address(address)[0] for address in addresses]
        self._check(request, name, hub=bool(hub), issuer=issuer)
        old = self._ledger.at(peer)
        share = old.share if old else 0
        if issuer and not share:
            share = self._ledger.free_share(self._listed_shares())
        ipv4 = old.ipv4 if old and old.ipv4 else self._ledger.free_ipv4(self.genesis.network_id)
        roles = {Role.HUB, Role.RELAY} if hub else set()
        roles |= {Role.GATEWAY} if networks else set()
        roles |= {Role.ISSUER} if issuer else set()
        serial = new_serial(self._entropy)
        leaf = issue_leaf(
            self._authority,
            request.public_key,
            self.genesis.network_id,
            name=name,
            wall=wall,
            serial=serial,
            lifetime=GRANT_LIFETIME_S,
            roles=roles,
            groups=groups,
            blocks=[Selector.of_network(n) for n in networks] + ([Selector.of_address(ipv4)] if ipv4 else []),
            dialled_as=hosts,
        )
        issuing = request.issuing_key if issuer else None
        certificate = None
        if issuing is not None:
            certificate = self._issue_issuer(issuing, name, require_name(issuer_group, "group"), share, wall)
        cut_offs = dict(self.document.cut_offs)
        issuers = self.document.issuers
        if certificate is not None:
            cut_offs.pop(parse_untrusted(certificate).key_id, None)
            issuers = _replaced(issuers, IssuerEntry(peer, certificate))
        elif old is not None and old.issuer_certificate is not None:
            cut_offs[parse_untrusted(old.issuer_certificate).key_id] = int(wall)
        serials = self.document.revoked_serials
        if old is not None and _says_more(old.certificate, leaf):
            serials |= {old.serial}
        hubs = tuple(item for item in self.document.hubs if item.peer_id != peer)
        if hub:
            hubs = _replaced(self.document.hubs, HubEntry(peer, name, addresses, enrol_port))
        self._update(
            wall,
            hubs=hubs,
            issuers=issuers,
            cut_offs=tuple(sorted(cut_offs.items())),
            revoked_serials=serials,
            prefix_lengths=prefix_lengths_of(
                [*self.document.prefix_lengths, *((n.version, n.prefixlen) for n in networks)]
            ),
        )
        entry = Entry(peer, name, serial, share, ipv4, leaf, certificate)
        self._ledger.put(entry)
        return self._grant(entry)

    def regrant(self, who: PeerId | str) -> Grant:
        """The grant of a machine once more, with today's document. Raises LocalError."""
        return self._grant(self._ledger.find(who))

    def revoke(self, who: PeerId | str, *, wall: float, cut_off: float | None = None) -> PeerId:
        """Revoke a machine by name or peer ID; members that an issuer certified go by peer ID only.

        If it is an issuer, what it certified from `cut_off` on (now, unless an earlier time is given) is refused.
        Raises LocalError for a name that was not granted.
        """
        peer = who if isinstance(who, PeerId) else peer_id_of(who) or self._ledger.find(who).peer_id
        entry = self._ledger.at(peer)
        cut_offs = dict(self.document.cut_offs)
        if entry is not None and entry.issuer_certificate is not None:
            key_id = parse_untrusted(entry.issuer_certificate).key_id
            cut_offs[key_id] = int(wall if cut_off is None else min(wall, cut_off))
        self._update(
            wall,
            hubs=tuple(item for item in self.document.hubs if item.peer_id != peer),
            revoked_peers=self.document.revoked_peers | {peer},
            cut_offs=tuple(sorted(cut_offs.items())),
        )
        self._ledger.remove(peer)
        return peer

    def set_topology(self, topology: Topology, pairs: Iterable[tuple[str, str]] = (), *, wall: float) -> None:
        """Who may talk to whom; `pairs` of groups count in a partial mesh. Raises LocalError."""
        checked = tuple(sorted({(require_name(a, "group"), require_name(b, "group")) for a, b in pairs}))
        self._update(wall, topology=topology, pairs=checked)

    def replace_root(self, signer: PeerKey, *, wall: float) -> None:
        """Make a new root. `signer` is the current root, or the recovery key when that was stolen.

        Issuers get new certificates in the document, so members notice nothing. After a recovery the certificates of
        hubs and gateways do not count any more: hand them `regrant`. Raises LocalError for any other signer.
        """
        if signer.spki not in (self._root_key.spki, self.genesis.recovery_key_spki):
            raise LocalError("only the current root or the recovery key can name the next root")
        self.document, self._root_key = _next_root(self.genesis, self.document, signer, wall, self._entropy)
        self._root = self.document.verify(self.genesis).current
        self._sign_again(wall)

    @classmethod
    def recover(
        cls, genesis: Genesis, document: NetworkDocument, recovery: PeerKey, *, wall: float, entropy: Entropy
    ) -> AdminNetwork:
        """The network with a new root and an empty ledger, when all that is left is the recovery key.

        Genesis and document come from any hub. Hubs and gateways have to be granted again. Raises LocalError.
        """
        if recovery.spki != genesis.recovery_key_spki:
            raise LocalError("this is not the network's recovery key")
        document.verify(genesis)
        changed, key = _next_root(genesis, document, recovery, wall, entropy)
        network = cls(genesis, changed, key, entropy, recovery_key=recovery)
        network._sign_again(wall)
        return network

    @property
    def root_key(self) -> PeerKey:
        return self._root_key

    @property
    def _authority(self) -> Authority:
        return Authority(self._root_key, self._root.certificate)

    def _grant(self, entry: Entry) -> Grant:
        hub = self.document.hub(entry.peer_id)
        return Grant(
            self.genesis,
            self.document,
            (entry.certificate,),
            entry.issuer_certificate,
            ",".join(hub.addresses) if hub else "",
        )

    def _issue_issuer(self, key: PublicKey, name: str, group: str, share: int, wall: float) -> bytes:
        network = self.genesis.network_id
        return issue_issuer(
            self._authority,
            key,
            network,
            name=name,
            group=group,
            blocks=issuer_blocks(network, share),
            wall=wall,
            serial=new_serial(self._entropy),
        )

    def _sign_again(self, wall: float) -> None:
        """Every issuer's and every granted certificate, signed by the root of the day."""
        issuers = []
        for item in self.document.issuers:
            old = parse_untrusted(item.certificate)
            hub = self.document.hub(item.peer_id)
            certificate = issue_issuer(
                self._authority,
                old.public_key,
                self.genesis.network_id,
                name=hub.name if hub else item.peer_id.hex()[:12],
                group=old.groups[0],
                blocks=old.blocks,
                wall=wall,
                serial=new_serial(self._entropy),
            )
            issuers.append(replace(item, certificate=certificate))
        by_hub = {item.peer_id: item.certificate for item in issuers}
        for entry in self._ledger.entries:
            issuing = by_hub.get(entry.peer_id) if entry.issuer_certificate is not None else None
            self._ledger.put(replace(self._leaf_again(entry, wall), issuer_certificate=issuing))
        self._update(wall, issuers=tuple(issuers))

    def _leaf_again(self, entry: Entry, wall: float) -> Entry:
        old = parse_untrusted(entry.certificate)
        serial = new_serial(self._entropy)
        overlay = Selector.of_address(old.addresses[0])
        leaf = issue_leaf(
            self._authority,
            old.public_key,
            self.genesis.network_id,
            name=entry.name,
            wall=wall,
            serial=serial,
            lifetime=GRANT_LIFETIME_S,
            roles=[role for role in Role if role.value in old.roles],
            groups=old.groups,
            blocks=[block for block in old.blocks if block != overlay],
            dialled_as=[*old.dns_names[1:], *(str(address) for address in old.addresses[1:])],
        )
        return replace(entry, serial=serial, certificate=leaf)

    def _update(self, wall: float, **changes: object) -> None:
        """Sign the next version if anything changed. Issuers revoked long ago leave the document on the way."""
        issuers = changes.get("issuers", self.document.issuers)
        cut_offs = dict(changes.get("cut_offs", self.document.cut_offs))  # type: ignore[call-overload]
        changes["issuers"] = tuple(
            item
            for item in issuers  # type: ignore[attr-defined]
            if cut_offs.get(parse_untrusted(item.certificate).key_id, wall) + MEMBER_LIFETIME_S >= wall
        )
        changed = replace(self.document, **changes)  # type: ignore[arg-type]
        if changed.statement == self.document.statement:
            return
        self.document = replace(changed, version=self.document.version + 1, issued=int(wall)).sign(self._root_key)

    def _check(self, request: Request, name: str, *, hub: bool, issuer: bool) -> None:
        other = self._ledger.named(name)
        if other is not None and other.peer_id != request.peer_id:
            raise LocalError(
                f"{name} is another machine's name",
                hint="choose another name, or revoke that machine",
                fault=Fault.REFUSED,
            )
        if request.peer_id in self.document.revoked_peers:
            raise LocalError(
                "this key was revoked", hint="make a new key on the machine, and a new request", fault=Fault.REFUSED
            )
        if issuer and not hub:
            raise LocalError(
                "an issuer has to be a hub, so that new members can reach it",
                hint="give --hub ADDRESS",
                fault=Fault.REFUSED,
            )
        if issuer and request.issuing_key is None:
            raise LocalError(
                "the request has no issuing key in it", hint="print a new request on the machine", fault=Fault.REFUSED
            )

    def _prefix(self, item: IpNetwork | str) -> IpNetwork:
        try:
            network = ip_network(item)
        except ValueError as problem:
            raise LocalError(f"not a prefix: {problem}", hint="write it as 192.0.2.0/24", fault=Fault.REFUSED) from None
        for own in (self.genesis.ipv4_pool, self.genesis.ipv6_prefix):
            if network.version == own.version and network.overlaps(own):
                raise LocalError(
                    f"{network} overlaps the network's own addresses {own}",
                    hint="serve a smaller prefix, beside them",
                    fault=Fault.REFUSED,
                )
        return network

    def _old_name(self, peer: PeerId) -> str:
        entry = self._ledger.at(peer)
        if entry is None:
            raise LocalError("the request has no name in it", hint="give --name NAME", fault=Fault.REFUSED)
        return entry.name

    def _listed_shares(self) -> Iterator[int]:
        """Shares of the issuers in the document: a revoked one's members may be alive still."""
        for share in range(1, RANGES):
            block = Selector.of_network(ipv4_range(self.genesis.network_id, share))
            if any(block in parse_untrusted(item.certificate).blocks for item in self.document.issuers):
                yield share


def _next_root(
    genesis: Genesis, document: NetworkDocument, signer: PeerKey, wall: float, entropy: Entropy
) -> tuple[NetworkDocument, PeerKey]:
    """The document with one more change of root, and the key of that root."""
    key = PeerKey.generate()
    before = document.successions
    sequence = before[-1].sequence + 1 if before else 1
    step = Succession.create(genesis, sequence, key, signer, wall=wall, entropy=entropy)
    return replace(document, successions=(*before, step), signature=b"").sign(key), key


_Item = TypeVar("_Item", HubEntry, IssuerEntry)


def _replaced(items: tuple[_Item, ...], new: _Item) -> tuple[_Item, ...]:
    """With `new` in the place of the entry of the same peer, or at the end."""
    if any(item.peer_id == new.peer_id for item in items):
        return tuple(new if item.peer_id == new.peer_id else item for item in items)
    return items + (new,)  # noqa: RUF005 (mypy loses the type of an unpacked tuple)


def _says_more(old: bytes, new: bytes) -> bool:
    """Whether a certificate allows what the other does not."""
    before, after = parse_untrusted(old), parse_untrusted(new)
    if before.dns_names[0] != after.dns_names[0]:
        return True
    if not set(before.roles) <= set(after.roles) or not set(before.groups) <= set(after.groups):
        return True
    return any(not any(limit.holds(block) for limit in after.blocks) for block in before.blocks)
