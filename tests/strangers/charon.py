"""strongSwan's IKE daemon in a host of the laboratory: the peer that nobody here wrote.

`charon-systemd` with `kernel-libipsec` (ESP in user space over a TUN device, tunnel mode, always in UDP), configured by
`swanctl`. Everything it reads and writes is in a directory of its own; it is ended by its pid.

    charon = Charon(lab.public("charon", "198.51.100.2"), tmp_path)
    charon.trust(root_pem)
    charon.own("charon.pem", certificate_pem, key_pem)
    with charon.running(connection("us", ...)):
        charon.initiate("net")
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from p2pvpn.lab.net import Node

DAEMON = "/usr/sbin/charon-systemd"
START_S = 15.0
PLUGINS = (
    "random nonce openssl gcm kdf hmac sha2 x509 pubkey pkcs1 pkcs8 pem revocation constraints addrblock curve25519 "
    "chapoly kernel-libipsec kernel-netlink socket-default vici updown"
)

_STRONGSWAN_CONF = """\
charon {{
  load = {plugins}
  {options}
  plugins {{
    vici {{
      socket = unix://{work}/charon.vici
    }}
  }}
  filelog {{
    log {{
      path = {work}/charon.log
      default = 1
      ike = 2
      flush_line = yes
    }}
  }}
  syslog {{
    daemon {{
      default = -1
    }}
    auth {{
      default = -1
    }}
  }}
}}
charon-systemd {{
  journal {{
    default = -1
  }}
}}
swanctl {{
  load = pem pkcs1 pkcs8 x509 pubkey openssl random
}}
"""


def block(name: str, settings: dict[str, object], indent: int = 0) -> str:
    """A section of strongSwan's configuration language from a dictionary; nested ones are sections in it."""
    pad = "  " * indent
    lines = [f"{pad}{name} {{"]
    for key, value in settings.items():
        if isinstance(value, dict):
            lines.append(block(key, value, indent + 1))
        else:
            lines.append(f"{pad}  {key} = {value}")
    return "\n".join([*lines, f"{pad}}}"])


class Charon:
    """One daemon on `node`; its files are in `work`. Without `kernel-libipsec` in `plugins` the kernel does its ESP;
    `options` are lines of the `charon` section, key to value."""

    def __init__(self, node: Node, work: Path, plugins: str = PLUGINS, **options: str) -> None:
        self.node = node
        self.work = work
        self.swanctl = work / "swanctl"
        for folder in ("x509", "x509ca", "private"):
            (self.swanctl / folder).mkdir(parents=True)
        lines = "\n  ".join(f"{key} = {value}" for key, value in options.items())
        (work / "strongswan.conf").write_text(
            _STRONGSWAN_CONF.format(plugins=plugins, options=lines, work=work), encoding="ascii"
        )
        self._environment = {"STRONGSWAN_CONF": f"{work}/strongswan.conf", "SWANCTL_DIR": str(self.swanctl)}
        self._process: subprocess.Popen[str] | None = None

    def trust(self, certificate_pem: bytes, name: str = "root.pem") -> None:
        """An authority it accepts."""
        (self.swanctl / "x509ca" / name).write_bytes(certificate_pem)

    def own(self, name: str, certificate_pem: bytes, key_pem: bytes) -> None:
        """A certificate of its own, to be named in `certs`, and the key to it."""
        (self.swanctl / "x509" / name).write_bytes(certificate_pem)
        (self.swanctl / "private" / name).write_bytes(key_pem)

    def start(self, configuration: str) -> None:
        """Start it with this swanctl.conf."""
        (self.swanctl / "swanctl.conf").write_text(configuration, encoding="ascii")
        with (self.work / "out").open("w") as out:
            self._process = self.node.popen([DAEMON], stdout=out, stderr=out, environment=self._environment)
        deadline = time.monotonic() + START_S
        while not (self.work / "charon.vici").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"charon did not start: {(self.work / 'out').read_text()}{self.log}")
            time.sleep(0.02)
        self.control("--load-all", "--noprompt")

    def stop(self) -> None:
        """End it, as gently as it lets us."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it by SIGKILL: it tells nobody. It may be started again."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None
        (self.work / "charon.vici").unlink()

    @contextlib.contextmanager
    def running(self, configuration: str) -> Iterator[Charon]:
        """Started, and stopped at the end."""
        try:
            self.start(configuration)
            yield self
        finally:
            self.stop()

    def control(self, *arguments: str, check: bool = True, timeout_s: float = 20.0) -> str:
        """Run swanctl(8); what it printed."""
        done = self.node.run(
            ["swanctl", *arguments, "--uri", f"unix://{self.work}/charon.vici"],
            check=check,
            timeout_s=timeout_s,
            environment=self._environment,
        )
        return done.stdout + done.stderr

    def initiate(self, child: str) -> subprocess.Popen[str]:
        """Begin in the background: the caller plays the peer meanwhile. `communicate` gives what it printed."""
        return self.node.popen(
            ["swanctl", "--initiate", "--child", child, "--uri", f"unix://{self.work}/charon.vici"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            environment=self._environment,
        )

    def terminate(self, ike: str) -> subprocess.Popen[str]:
        """Delete an IKE SA, in the background."""
        return self.node.popen(
            ["swanctl", "--terminate", "--ike", ike, "--uri", f"unix://{self.work}/charon.vici"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            environment=self._environment,
        )

    def sas(self) -> str:
        """Its SAs, as swanctl(8) lists them."""
        return self.control("--list-sas")

    @property
    def log(self) -> str:
        path = self.work / "charon.log"
        return path.read_text(errors="replace") if path.exists() else ""
