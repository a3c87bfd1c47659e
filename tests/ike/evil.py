"""A peer with the right keys and no manners: sends what no task of ours would build."""

from __future__ import annotations

from p2pvpn.core.address import Path
from p2pvpn.ike.message import Header, build_chain, parse_chain_untrusted
from p2pvpn.ike.payloads import Payload
from p2pvpn.ike.protect import Protection

from .world import Host


class Evil:
    """Acts for `host` inside its SA `sa_id`, beside the real machine and with its keys."""

    def __init__(self, host: Host, sa_id: int, victim: Host) -> None:
        self.host = host
        self.victim = victim
        self.sa = host.ike._by_id[sa_id]
        assert self.sa.keys is not None
        self.sealer = Protection(self.sa.keys, self.sa.initiator)
        self.sealer._next_iv = 1 << 40  # far from the IVs of the real machine
        self.opener = Protection(self.sa.keys, not self.sa.initiator)
        self.next_id = self.sa.requests.next_id

    def packet(
        self, exchange: int, first: int, chain: bytes, *, message_id: int | None = None, response=False
    ) -> bytes:
        number = self.next_id if message_id is None else message_id
        return self.sealer.seal(self.header(exchange, number, response=response), first, chain)

    def header(self, exchange: int, message_id: int, *, response: bool = False) -> Header:
        return Header(self.sa.spi_i, self.sa.spi_r, exchange, self.sa.initiator, response, message_id)

    def fragment(self, exchange: int, first: int, piece: bytes, number: int, total: int) -> bytes:
        return self.sealer.seal_fragment(self.header(exchange, self.next_id), first, piece, number, total)

    def give(self, data: bytes) -> list:
        """The victim gets a datagram; its outputs."""
        path = Path(self.victim.address, self.host.address)
        outputs = self.victim.ike.handle(path, data, self.host.world.now)
        self.victim.run(outputs)
        return outputs

    def ask(self, exchange: int, payloads: list[Payload]) -> list[Payload] | None:
        """A request in its turn; the payloads of the answer, None when there is none."""
        return self.ask_raw(exchange, *build_chain(payloads))

    def ask_raw(self, exchange: int, first: int, chain: bytes) -> list[Payload] | None:
        sent = len(self.victim.sent())
        self.give(self.packet(exchange, first, chain))
        answers = self.victim.sent()[sent:]
        if not answers:
            return None
        self.next_id += 1
        opened = self.reader().open_untrusted(answers[0])
        return list(parse_chain_untrusted(opened.first, opened.plain))

    def reader(self) -> Protection:
        """Opens what the victim sends to us."""
        return self.sealer
