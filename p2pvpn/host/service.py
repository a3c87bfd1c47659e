"""One network of the daemon with what the engine leaves to the machine: files, enrolment, renewal."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from dataclasses import dataclass

from p2pvpn.core.errors import Fault, LocalError, P2pvpnError
from p2pvpn.identity.document import NetworkDocument
from p2pvpn.identity.enrolment import Issuer
from p2pvpn.identity.invitations import Token
from p2pvpn.identity.profile import ISSUER_STATE, Profile
from p2pvpn.mesh.network import Network
from p2pvpn.mesh.node import Node
from p2pvpn.mesh.renewal import keep_renewed

from .enrol import enrol
from .enrol_server import Desk, document_resolver
from .listeners import Listeners
from .records_db import RecordsDb
from .store import NetworkDirectory

RECORDS_FILE = "records.sqlite"


@dataclass(frozen=True, slots=True)
class Problem:
    """A network that is not up, or is of no use, and what to do about it."""

    network: str
    error: P2pvpnError

    def as_dict(self) -> dict[str, object]:
        return {"network": self.network, "message": str(self.error), "hint": self.error.hint, "fault": self.error.fault}


class NetworkService:
    """Opens and closes one network."""

    def __init__(self, node: Node, listeners: Listeners, directory: NetworkDirectory, profile: Profile) -> None:
        self._node = node
        self._listeners = listeners
        self._directory = directory
        self._store = directory.open()
        self.profile = profile
        self.issuer: Issuer | None = self._make_issuer()
        self.network: Network | None = None
        self._desk: Desk | None = None
        self._database: RecordsDb | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Bring it up. Raises LocalError when a port or a file cannot be had; nothing is open then."""
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise

    async def _open(self) -> None:
        member = self.profile.member
        if member.is_hub:
            path = self._directory.path / RECORDS_FILE
            try:
                self._database = RecordsDb(path)
                self.network = await self._node.add_network(self.profile, self._store, self._database)
            except sqlite3.Error as problem:
                hint = "free some space, or delete it: the other hubs have the records too"
                raise LocalError(f"{path} cannot be used: {problem}", hint=hint, fault=Fault.STATE) from None
        else:
            self.network = await self._node.add_network(self.profile, self._store, None)
        if self.issuer is not None:
            issuer = self.issuer
            self.network.on_member = lambda other: issuer.note(other, time.time())
        if member.is_hub:
            entry = self.profile.document.hub(self.profile.key.peer_id)
            port = entry.enrol_port if entry is not None else 443
            self._desk = Desk(self.profile, self.issuer)
            await self._listeners.add(port, self._desk)
        self._renewing = self._node.services.tasks.start(
            keep_renewed(self._node.services, self.network.standing, self._renew, self._node.refresh_credentials),
            f"renew in {self.profile.name}",
        )

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        if self._desk is not None:
            await self._listeners.remove(self._desk)
        if self.network is not None:
            await self._node.remove_network(self.network.label)
        if self._database is not None:
            self._database.close()

    def _make_issuer(self) -> Issuer | None:
        try:
            return self.profile.make_issuer(entropy=os.urandom, write=self._store.write)
        except LocalError as problem:
            path = self._directory.path / ISSUER_STATE
            hint = f"put back a copy of {path}, or delete it: invitations that are open will not work then"
            raise LocalError(str(problem), hint=hint, fault=Fault.STATE) from None

    def take_document(self, document: NetworkDocument) -> None:
        """A grant brought a newer document."""
        assert self.network is not None
        self.network.take_document(document.encode(), "a grant")

    def invite(self, name: str, valid_s: float) -> Token:
        """Raises LocalError when this machine cannot invite."""
        if self.issuer is None:
            raise LocalError(
                f"this machine is no issuer of {self.profile.name}",
                hint="invite on a hub that was granted --issuer",
                fault=Fault.REFUSED,
            )
        return self.issuer.invite(name, time.time(), lifetime=valid_s)

    async def _renew(self, profile: Profile) -> None:
        problem: P2pvpnError = LocalError("the network document names no issuer")
        resolve = document_resolver(profile)
        for issuer in profile.document.issuer_ids:
            addresses = [*resolve(issuer)]
            addresses += [hub.enrol_addresses[0] for hub in profile.document.hubs if hub.peer_id != issuer]
            try:
                answer = await enrol(addresses, issuer, profile.renew_request(issuer))
                profile.accept_untrusted(answer, time.time())
                return
            except P2pvpnError as failure:
                problem = failure
        raise problem
