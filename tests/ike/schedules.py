"""Seeded schedules of wishes on both sides at once, over a wire that loses, doubles and shuffles IKE messages.

`run(seed)` plays one and raises AssertionError unless it ends well: one IKE SA and one set of Child SAs, the same on
both sides, and no user packet lost on the way. `python -m tests.ike.schedules 10000` plays many.
"""

from __future__ import annotations

import random
import sys
import time

from p2pvpn.core.address import Path
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.outputs import SaClosed

from .people import Authority, credential
from .traffic import Planes, is_main
from .world import Host, World, selectors

BLOCKS = {"alice": ("fd00::a/128", "fd00:a::/32"), "bob": ("fd00::b/128", "fd00:b::/32")}
ROOT = Authority()
CREDENTIALS = {name: credential(ROOT, name, blocks=BLOCKS, local=BLOCKS[name]) for name in BLOCKS}
HYBRID = {"additional_kexes": ((KexMethod.ML_KEM_768,),)}
SETTINGS = {"retry_s": 0.3, "retry_factor": 1.15, "tries": 40, "setup_tries": 40, "delete_tries": 8, "later_s": 2.0}


def live(host: Host) -> tuple[int, dict[int, object]]:
    """The one IKE SA's id and its Child SAs."""
    (sa_id,) = host.ike.sa_ids()
    return sa_id, host.ike._by_id[sa_id].children.live


def wish(host: Host, dice: random.Random) -> None:
    """One thing that the engine might want."""
    now = host.world.now
    sa_id, children = live(host)
    mains = [one.id for one in children.values() if is_main(one)]
    extras = [one for one in children if one not in mains]
    what = dice.choices(
        ["rekey_child", "rekey", "add_child", "close_extra", "rekey_extra", "inform"], [8, 6, 1, 2, 2, 1]
    )[0]
    if what == "rekey_child" and mains:
        host.do("rekey_child", sa_id, dice.choice(mains), now)
    elif what == "rekey":
        host.do("rekey", sa_id, now)
    elif what == "add_child":
        mine, theirs = ("a", "b") if host.name == "alice" else ("b", "a")
        host.do("add_child", sa_id, selectors(f"fd00:{mine}::/32"), selectors(f"fd00:{theirs}::/32"), now)
    elif what == "close_extra" and extras:
        host.do("close_child", sa_id, dice.choice(extras), now)
    elif what == "rekey_extra" and extras:
        host.do("rekey_child", sa_id, dice.choice(extras), now)
    elif what == "inform":
        host.do("probe", sa_id, now)


def run(seed: int) -> dict[str, int]:
    """One schedule; what happened in it."""
    dice = random.Random(f"schedule/{seed}")
    world = World(seed)
    more = dict(HYBRID) if dice.random() < 0.2 else {}
    if dice.random() < 0.2:
        more["child_additional_kexes"] = ((KexMethod.ML_KEM_768,),)
        more.setdefault("additional_kexes", HYBRID["additional_kexes"])
    alice, bob = (
        world.host(name, address, CREDENTIALS[name], **SETTINGS, **more)
        for name, address in (("alice", "192.0.2.1"), ("bob", "192.0.2.2"))
    )
    if dice.random() < 0.2:
        # Each prefers another group: INVALID_KE_PAYLOAD in the middle of a collision.
        bob.ike._local.settings = world.host("x", "192.0.2.9", **SETTINGS, **more, child_kexes=(KexMethod.ECP_256,),
            kexes=(KexMethod.ECP_256, KexMethod.CURVE25519)).ike._local.settings  # fmt: skip
        world.hosts.pop()
    planes = Planes(world, [alice, bob])
    alice.initiate(bob, local=selectors("fd00::a/128"), remote=selectors("fd00::b/128"))
    world.run(3)
    loss, twice = dice.choice((0.0, 0.1, 0.3)), dice.choice((0.0, 0.2))

    def fate(path: Path, data: bytes) -> list[float]:
        copies = (0 if dice.random() < loss else 1) + (dice.random() < twice)
        return [dice.choice((0.01, 0.02, 0.1, 0.6)) * dice.uniform(0.5, 1.5) for _ in range(copies)]

    world.fate = fate
    for _ in range(dice.randint(2, 6)):
        first, second = dice.sample([alice, bob], 2)
        wish(first, dice)
        if dice.random() < 0.7:
            planes.run(dice.choice((0.0, 0.0, 0.01, 0.05)))
            wish(second, dice)
        for _ in range(dice.choice((1, 3, 40))):
            planes.step(dice.choice((0.01, 0.05, 0.2)))
    world.fate = lambda path, data: (0.01,)
    for _ in range(40):
        planes.step(0.25)
    planes.run(120)
    check(alice, bob, planes)
    return {"packets": planes.sent, "wire": len(world.wire)}


def check(alice: Host, bob: Host, planes: Planes) -> None:
    """It ended well."""
    assert not planes.lost, planes.lost[:3]
    assert planes.received == planes.sent
    for host in (alice, bob):
        assert not host.events(SaClosed), host.events(SaClosed)
        assert len(host.ike._by_id) == len(host.ike._by_spi) == 1, [one.state for one in host.ike._by_id.values()]
        sa_id, children = live(host)
        assert sa_id == 1, "the engine's id stays"
        assert host.installed.keys() == children.keys(), "nothing is left in the plane"
        assert not host.ike._by_id[sa_id].kin
    ours, theirs = alice.ike._by_id[1], bob.ike._by_id[1]
    assert (ours.spi_i, ours.spi_r) == (theirs.spi_i, theirs.spi_r)
    assert ours.keys.d == theirs.keys.d
    pairs = {(one.spi_in, one.spi_out): one for one in alice.installed.values()}
    assert pairs.keys() == {(one.spi_out, one.spi_in) for one in bob.installed.values()}
    for other in bob.installed.values():
        mate = pairs[other.spi_out, other.spi_in]
        assert (mate.key_in, mate.key_out) == (other.key_out, other.key_in)
    mains = [one for one in alice.installed.values() if is_main(one)]
    assert len(mains) == 1, f"{len(mains)} Child SAs for the same traffic"
    assert mains[0].id in alice.used


def main(count: int, first: int = 0) -> int:
    """Plays `count` schedules; the number of those that ended badly."""
    began, bad, packets = time.monotonic(), 0, 0
    for seed in range(first, first + count):
        try:
            packets += run(seed)["packets"]
        except Exception as problem:  # noqa: BLE001 (every kind of failure counts)
            bad += 1
            print(f"seed {seed}: {type(problem).__name__} {str(problem)[:300]}")
    seconds = time.monotonic() - began
    print(f"{count} schedules, {packets} user packets, {bad} ended badly, {seconds:.0f} s")
    return bad


if __name__ == "__main__":
    sys.exit(min(1, main(*(int(one) for one in sys.argv[1:]))))
