"""Machines on which tests type real commands, and what a refusal must look like."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pvpn.core.errors import Fault
from p2pvpn.lab.net import Node

CLI = (sys.executable, "-m", "p2pvpn.cli.main")
PASSPHRASE = "correct horse"
HINT_INDENT = "  "


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def word(self) -> str:
        """The last word that it printed: a REQUEST, GRANT or TOKEN."""
        return self.out.split()[-1]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Machine:
    """A state and a runtime directory, and the namespace that commands run in (None: the test's own)."""

    root: Path
    node: Node | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = {
            "P2PVPN_STATE_DIR": str(self.state),
            "P2PVPN_RUNTIME_DIR": str(self.root / "run"),
            "P2PVPN_PLANE": "user",
            "HOME": str(self.root),
            **self.environment,
        }
        self.root.mkdir(parents=True, exist_ok=True)

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def network(self) -> Path:
        """The directory of the only network."""
        (found,) = (path for path in (self.state / "networks").iterdir() if not path.name.startswith("."))
        return found

    def command(self, argv: Sequence[str]) -> list[str]:
        return self.node.command(argv) if self.node is not None else list(argv)

    def popen(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command and do not wait for it."""
        return subprocess.Popen(
            self.command([*CLI, *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment, **(environment or {})},
        )

    def run(
        self,
        *arguments: str,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 45.0,
        prefix: Sequence[str] = (),
    ) -> Outcome:
        """Run a command to its end. A daemon that it leaves behind does not hold us: output goes to files."""
        with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin)
            given.seek(0)
            done = subprocess.run(
                self.command([*prefix, *CLI, *arguments]),
                stdin=given,
                stdout=out,
                stderr=err,
                env={**os.environ, **self.environment, **(environment or {})},
                timeout=timeout_s,
                check=False,
            )
            out.seek(0)
            err.seek(0)
            return Outcome(done.returncode, out.read().decode(errors="replace"), err.read().decode(errors="replace"))

    def ok(self, *arguments: str, **options: Any) -> Outcome:
        """As `run`; it has to succeed."""
        outcome = self.run(*arguments, **options)
        assert outcome.code == 0, outcome
        return outcome

    def pids(self) -> list[int]:
        """Every process that has this machine's state directory in its environment."""
        wanted = f"P2PVPN_STATE_DIR={self.state}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        path = self.state / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""


def refused(outcome: Outcome, fault: Fault, *words: str) -> None:
    """One sentence with these words, a hint under it, the exit code, and no traceback."""
    lines = outcome.err.splitlines()
    assert outcome.code == fault, outcome
    assert "Traceback" not in outcome.out + outcome.err, outcome
    assert len(lines) == 2, outcome
    assert lines[0].startswith("error: "), outcome
    assert lines[1].startswith(HINT_INDENT), outcome
    assert lines[1].strip(), outcome
    for word in words:
        assert word in outcome.err, (word, outcome)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file of a directory and its content; logs and locks left out."""
    kept = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix != ".log" and path.name not in ("lock", "daemon.log.1"):
            kept[str(path.relative_to(directory))] = path.read_bytes()
    return kept


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A temporary directory whose name leaves room for the path of a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="p2-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def new_admin(root: Path) -> tuple[Machine, tuple[str, str]]:
    """An admin with a network called `home`, and the options with the passphrase."""
    admin = Machine(root)
    file = root / "passphrase"
    file.write_text(PASSPHRASE + "\n")
    secret = ("--passphrase-file", str(file))
    admin.ok("network", "create", "home", *secret)
    return admin, secret
