"""Plaintext that claims an overlay source and does not come out of our TUN device is dropped.

Without this anybody on the same link could send the machine a packet "from" a peer, unencrypted, and the kernel would
deliver it. The rules sit before connection tracking, so such packets make no state either. nftables is used where it
works, iptables elsewhere; where neither does, the guard refuses rather than leave the door open.

    table inet p2pvpn_guard: prerouting, priority raw: source in a route of the network, device neither the network's
                             nor lo (the machine talking to itself): drop

Where the kernel itself decrypts, packets come out of the device that brought their ESP. There the rule is about those
that no SA decrypted.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from p2pvpn.core.address import IpNetwork
from p2pvpn.core.errors import Fault, LocalError

TABLE = "p2pvpn_guard"
CHAIN = "P2PVPN_GUARD"


_NFT = ("nft",)
_FILTERS = (_NFT, ("iptables", "ip6tables"), ("iptables-legacy", "ip6tables-legacy"))
"""The last for kernels without nf_tables on machines whose iptables is made for that."""


class Rule(NamedTuple):
    """Sources that one device alone may bring; `or_decrypted` lets in what the kernel's IPsec decrypted, too."""

    prefixes: tuple[IpNetwork, ...]
    or_decrypted: bool = False

    def of(self, version: int) -> list[IpNetwork]:
        return [prefix for prefix in self.prefixes if prefix.version == version]


class Guard:
    """The rules of all networks of this machine. One daemon, one guard."""

    def __init__(self) -> None:
        self._prefixes: dict[str, Rule] = {}
        self._working: tuple[str, ...] = _NFT
        self._hooked: dict[str, bool] = {}
        """By program of iptables: whether PREROUTING leads to our chain."""
        self._lock = asyncio.Lock()

    async def protect(self, device: str, prefixes: Sequence[IpNetwork], *, or_decrypted: bool = False) -> None:
        """Only `device` may bring packets whose source is in `prefixes`. Raises LocalError when no filter works."""
        async with self._lock:
            former = self._prefixes.get(device)
            self._prefixes[device] = Rule(tuple(prefixes), or_decrypted)
            try:
                await self._apply()
            except LocalError:
                if former is None:
                    del self._prefixes[device]
                else:
                    self._prefixes[device] = former
                raise

    async def release(self, device: str) -> None:
        """Forget a device that is gone."""
        async with self._lock:
            if self._prefixes.pop(device, None) is not None:
                await self._apply()

    async def clear(self) -> None:
        """Remove what a daemon that was killed left, before anything is protected. Raises LocalError."""
        async with self._lock:
            await self._apply()

    async def close(self) -> None:
        """Remove every rule."""
        async with self._lock:
            if self._prefixes:
                self._prefixes.clear()
                await self._apply()

    async def _apply(self) -> None:
        """Try each filter that is installed, until one works; that one is tried first from then on."""
        problem = LocalError("neither nft nor iptables is installed", hint="install nftables", fault=Fault.MACHINE)
        for programs in sorted(_FILTERS, key=lambda programs: programs is not self._working):
            if any(shutil.which(program) is None for program in _run_by(programs)):
                continue
            try:
                if programs is _NFT:
                    await _run("nft", "-f", "-", stdin=nft_script(self._prefixes))
                else:
                    for version, program in zip((4, 6), programs, strict=True):
                        await self._apply_iptables(program, version)
                self._working = programs
                return
            except LocalError as error:
                problem = error
        raise problem

    async def _apply_iptables(self, program: str, version: int) -> None:
        """One transaction: the chain, and the jump to it out of PREROUTING, which goes with the last rule."""
        hooked = self._hooked.get(program)
        if hooked is None:
            hooked = await _succeeds(program, "-w", "-t", "raw", "-C", "PREROUTING", "-j", CHAIN)
        script = iptables_script(self._prefixes, version, hooked=hooked)
        try:
            await _run(f"{program}-restore", "--noflush", "-w", stdin=script)
            self._hooked[program] = bool(self._prefixes)
        except LocalError:
            if self._hooked.pop(program, None) is None:
                raise
            await self._apply_iptables(program, version)  # somebody else changed the table since


def nft_script(rules: Mapping[str, Rule]) -> str:
    """One transaction that replaces the whole table; without devices it only removes it."""
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}"]
    if rules:
        lines += [f"table inet {TABLE} {{", "chain prerouting {", "type filter hook prerouting priority raw;"]
        for device, rule in sorted(rules.items()):
            plain = "meta ipsec missing " if rule.or_decrypted else ""
            for version, family in ((4, "ip"), (6, "ip6")):
                members = ", ".join(map(str, rule.of(version)))
                if members:
                    match = f'iifname != {{ "lo", "{device}" }} {plain}{family} saddr {{ {members} }}'
                    lines.append(f"{match} counter drop")
        lines += ["}", "}"]
    return "\n".join(lines) + "\n"


def _run_by(programs: tuple[str, ...]) -> tuple[str, ...]:
    return programs if programs is _NFT else (*programs, *(f"{program}-restore" for program in programs))


def iptables_script(rules: Mapping[str, Rule], version: int, *, hooked: bool) -> str:
    """Input of iptables-restore: the chain, flushed and filled in one go, or taken away; `hooked`: the jump stands."""
    lines = ["*raw", f":{CHAIN} - [0:0]"]
    jump = f"PREROUTING -j {CHAIN}"
    if not rules:
        lines += [f"-D {jump}"] * hooked + [f"-X {CHAIN}"]
    else:
        lines += [f"-I {jump}"] * (not hooked)
        lines.append(f"-A {CHAIN} -i lo -j RETURN")
    for device, rule in sorted(rules.items()):
        plain = "-m policy --dir in --pol none " if rule.or_decrypted else ""
        lines += [f"-A {CHAIN} ! -i {device} {plain}-s {net} -j DROP" for net in rule.of(version)]
    return "\n".join([*lines, "COMMIT"]) + "\n"


async def _run(*argv: str, stdin: str = "") -> None:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate(stdin.encode())
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise LocalError(f"{argv[0]}: {lines[0]}", fault=Fault.MACHINE)


async def _succeeds(*argv: str) -> bool:
    try:
        await _run(*argv)
    except LocalError:
        return False
    return True
