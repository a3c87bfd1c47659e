"""What only the kernel plane can show: its numbers, its events, and what `ip xfrm` says. Runs in User-Mode Linux."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import replace

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError
from p2pvpn.core.selector import Selector
from p2pvpn.host import planes, xfrm
from p2pvpn.host.guard import Guard
from p2pvpn.host.kernel_plane import KernelPlane
from p2pvpn.host.netlink import Netlink
from p2pvpn.host.underlay import Underlay
from p2pvpn.host.user_plane import UserPlane
from p2pvpn.lab import uml
from p2pvpn.lab.net import Lab
from tests.host.peers import INNER, ROUTES, children, link
from tests.planes.test_death import xfrm_of

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]
MANY = 1000
MANY_CPU_S = 2.0
BATCH = 20


def spin():
    """Seconds for a piece of work that is always the same. A guest takes the time that its host gave to others for its
    own: how much longer than at best this takes says how much of what is measured beside it was somebody else's.
    """
    began = time.perf_counter()
    for _ in range(60000):
        pass
    return time.perf_counter() - began


if uml.is_inside():

    @pytest.fixture(scope="module")
    def machine():
        with Lab() as lab:
            yield link(lab)[0]

    @pytest.fixture
    def host(machine):
        """Host a, on which the test itself runs, on one wire with b; it is left as it was found."""
        before = xfrm_of(machine)
        with machine.inside():
            yield machine
        assert xfrm_of(machine) == before

    def on_plane(story):
        import ipaddress

        async def run():
            netlink = await Netlink.open()
            underlay = await Underlay.open(netlink)
            guard = Guard()
            plane = KernelPlane(underlay.esp_sockets, netlink, guard)
            await plane.start()
            addresses = [ipaddress.ip_address(address) for address in INNER["a"]]
            await plane.open_network("bench", addresses, [ipaddress.ip_network(route) for route in ROUTES], 1400)
            try:
                await story(plane)
            finally:
                await plane.stop()
                await guard.close()
                underlay.close()
                netlink.close()

        asyncio.run(run())

    def test_a_thousand_sas_take_less_than_two_seconds_and_go_without_a_trace(host):
        async def story(plane):
            empty = xfrm_of(host)
            pairs = [children(number)[0] for number in range(1, MANY + 1)]
            for number, child in enumerate(pairs):
                v4, v6 = (
                    Selector.of_address(f"10.9.{4 + number // 250}.{1 + number % 250}"),
                    f"fd00:9::1:{number + 1:x}",
                )
                pairs[number] = replace(
                    child, remote=(v4, Selector.of_address(v6)), spi_in=0xC1000000 + number, spi_out=0xC2000000 + number
                )
            spent, spins = 0.0, []
            for at in range(0, MANY, BATCH):
                began = time.perf_counter()
                for child in pairs[at : at + BATCH]:
                    await plane.install(child)
                    await plane.use(child.id)
                spent += time.perf_counter() - began
                spins.append(spin())
            stolen = statistics.mean(spins) / min(spins)
            cpu = spent / stolen
            print(f"{MANY} SAs in use: {cpu:.2f} s of CPU ({spent:.2f} s on a clock {stolen:.1f} times slow)")
            states, policies = xfrm_of(host)
            assert states.count("proto esp spi") == 2 * MANY
            assert policies.count("proto esp reqid") == 4 * MANY
            began = time.process_time()
            usage = await plane.usage([child.id for child in pairs])
            print(f"usage of all: {time.process_time() - began:.2f} s of CPU")
            assert len(usage) == MANY
            began = time.process_time()
            for child in pairs:
                await plane.remove(child.id)
            print(f"removed: {time.process_time() - began:.2f} s of CPU")
            assert xfrm_of(host) == empty
            assert cpu < MANY_CPU_S

        on_plane(story)

    def test_ip_xfrm_shows_what_the_documentation_says(host):
        async def story(plane):
            ours, _ = children(42)
            await plane.install(ours)
            states, policies = xfrm_of(host)
            assert states.count("reqid 1000000042 ") == 2
            assert host.run(["ip", "-s", "xfrm", "state"]).stdout.count(f"uid {xfrm.TAG}") == 2
            assert states.count("encap type espinudp sport 4500 dport 4500") == 2
            assert states.count(f"replay_window {xfrm.REPLAY_WINDOW}") == 2
            assert policies.count("reqid 1000000042") == 2
            assert "dir out priority 936" not in policies
            await plane.use(42)
            assert policies_of(host, "src 10.9.0.1/32 dst 10.9.0.2/32") == [
                "dir out priority 936 ptype main",
                "tmpl src 192.0.2.10 dst 192.0.2.20",
                "proto esp reqid 1000000042 mode tunnel",
            ]
            second = replace(ours, id=43, spi_in=0xC0000999, spi_out=0xC0000998)
            await plane.install(second)
            accepted = policies_of(host, "src 10.9.0.2/32 dst 10.9.0.1/32")
            assert accepted[0] == "dir in priority 936 ptype main"
            assert [line for line in accepted if "level use" in line] == [
                "proto esp reqid 1000000042 mode tunnel",
                "level use",
            ] or sum("level use" in line for line in accepted) == 2
            await plane.remove(42)
            assert sum("level use" in line for line in policies_of(host, "src 10.9.0.2/32 dst 10.9.0.1/32")) == 0

        on_plane(story)

    def policies_of(host, selector):
        """The lines of one policy."""
        lines = [line.strip() for line in xfrm_of(host)[1].splitlines()]
        at = lines.index(selector)
        end = next((n for n in range(at + 1, len(lines)) if lines[n].startswith("src ")), len(lines))
        return lines[at + 1 : end]

    def test_an_sa_whose_numbers_are_used_up_is_told(host):
        async def story(plane):
            told = asyncio.Event()
            spis = []
            events = xfrm.XfrmEvents(lambda *_: None, lambda spi, hard: (spis.append((spi, hard)), told.set()))
            ours, _ = children(1)
            await plane.install(ours)
            flow = xfrm.Flow(Endpoint("192.0.2.10", 4500), Endpoint("192.0.2.20", 4500))
            state = xfrm.State(flow, ours.spi_out, xfrm.REQIDS.start + 1, ours.suite, ours.key_out, False, False)
            message = xfrm.set_state(state, update=True)
            message.fields["hard_packets"] = 2
            kernel = xfrm.Xfrm()
            kernel.request(message)
            await plane.use(1)
            process = await asyncio.create_subprocess_exec(
                "ping", "-c", "4", "-i", "0.1", "-W", "1", INNER["b"][0], stdout=-3
            )
            await asyncio.wait_for(told.wait(), 20)
            await process.wait()
            assert spis[0] == (ours.spi_out, True)
            assert (await plane.counters())["SAs expired"] >= 1
            kernel.close()
            events.close()

        on_plane(story)

    def test_what_goes_wrong_half_way_leaves_nothing(host):
        async def story(plane):
            empty = xfrm_of(host)
            ours, _ = children(1)
            kernel = xfrm.Xfrm()
            flow = xfrm.Flow(ours.path.local, ours.path.remote)
            foreign = xfrm.State(flow, ours.spi_out, 5, ours.suite, ours.key_out, False, False)
            kernel.request(xfrm.set_state(foreign))
            taken = xfrm_of(host)
            with pytest.raises(LocalError, match="exists"):
                await plane.install(ours)
            assert xfrm_of(host) == taken
            kernel.request(xfrm.delete_state(flow, ours.spi_out))
            kernel.close()
            with pytest.raises(LocalError, match="range"):
                await plane.install(replace(ours, remote=(replace(ours.remote[0], start_port=5, end_port=9),)))
            await plane.install(ours)
            await plane.remove(ours.id)
            assert xfrm_of(host) == empty

        on_plane(story)

    def test_the_kernel_is_chosen_where_it_can(host):
        assert planes.choose(planes.Wanted.AUTO) == planes.Choice("kernel")
        assert planes.choose(planes.Wanted.KERNEL) == planes.Choice("kernel")
        assert planes.choose(planes.Wanted.USER) == planes.Choice("user")
        assert xfrm_of(host) == ("", "")

else:

    def test_without_esp_in_the_kernel_the_user_plane_is_chosen_and_says_why(lab):
        with lab.node("a").inside():
            try:
                planes.probe()
            except LocalError as problem:
                reason = str(problem)
                assert planes.choose(planes.Wanted.AUTO) == planes.Choice("user", reason)
                with pytest.raises(LocalError, match="cannot be the plane"):
                    planes.choose(planes.Wanted.KERNEL)
            else:
                assert planes.choose(planes.Wanted.AUTO).plane == "kernel"
            assert planes.choose(planes.Wanted.USER) == planes.Choice("user")

    def test_the_plane_is_made_as_chosen(lab):
        async def story():
            netlink = await Netlink.open()
            assert isinstance(planes.make(planes.Choice("user"), (), netlink, Guard()), UserPlane)
            assert isinstance(planes.make(planes.Choice("kernel"), (), netlink, Guard()), KernelPlane)
            netlink.close()

        with lab.node("a").inside():
            asyncio.run(story())


def test_the_wanted_plane_is_said_by_option_or_environment():
    assert planes.wanted(None, {}) is planes.Wanted.AUTO
    assert planes.wanted(None, {"P2PVPN_PLANE": "user"}) is planes.Wanted.USER
    assert planes.wanted("kernel", {"P2PVPN_PLANE": "user"}) is planes.Wanted.KERNEL
    with pytest.raises(LocalError, match="no plane"):
        planes.wanted(None, {"P2PVPN_PLANE": "warp"})
