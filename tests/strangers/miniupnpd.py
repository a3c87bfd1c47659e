"""miniupnpd, the daemon of most home routers' PCP, NAT-PMP and UPnP, on a router of the laboratory.

Its chains are in a table of its own beside the laboratory's NAT, which lets through what was DNATed. It refuses to work
at an address of the documentation ranges, so homes with it are at addresses of 11.0.0.0/8, which nobody announces in
a laboratory.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from p2pvpn.lab.net import Home, running

START_S = 5.0
PUBLIC = "11.0.0.{}"
_TABLES = """
table inet filter {
  chain miniupnpd { }
  chain prerouting_miniupnpd { }
  chain postrouting_miniupnpd { }
  chain prerouting {
    type nat hook prerouting priority -110;
    jump prerouting_miniupnpd
  }
  chain postrouting {
    type nat hook postrouting priority 90;
    jump postrouting_miniupnpd
  }
}
"""
_CONFIGURATION = """
ext_ifname=wan
listening_ip=lan
enable_natpmp={pcp}
enable_upnp={upnp}
force_igd_desc_v1={version1}
secure_mode=yes
uuid=00000000-0000-0000-0000-000000000001
min_lifetime=120
max_lifetime=86400
"""


@contextlib.contextmanager
def miniupnpd(
    home: Home, directory: Path, *, pcp: bool = True, upnp: bool = False, version1: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """The router of `home`, whose NAT is set up, maps ports meanwhile."""
    home.router.nft(_TABLES)
    home.router.ip("route replace 239.0.0.0/8 dev lan")
    words = {True: "yes", False: "no"}
    file = directory / f"{home.router}.conf"
    file.write_text(_CONFIGURATION.format(pcp=words[pcp], upnp=words[upnp], version1=words[version1]))
    said = directory / f"{home.router}.log"
    log = said.open("w")
    argv = ["miniupnpd", "-d", "-f", str(file), "-P", str(directory / f"{home.router}.pid")]
    with log, running(home.router.popen(argv, stdout=log, stderr=log)) as process:
        ready = [*(["NAT-PMP/PCP traffic"] if pcp else []), *(["HTTP listening"] if upnp else [])]
        deadline = time.monotonic() + START_S
        while not all(word in said.read_text() for word in ready):
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.01)
        yield process
