"""`p2pvpn demo`: two machines behind NATs meet, go direct, survive the death of a hub and hostile NATs.

Everything is done by the commands that a user types, on a small Internet of namespaces, with every hop captured. What
the daemons say of themselves is never the evidence for a figure: losses come from numbered packets, paths and times
from the capture, and ESP counts only if it decrypts.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import p2pvpn
from p2pvpn.core.errors import LocalError, P2pvpnError
from p2pvpn.host import planes

from . import uml
from .acts import ROOT, Demo, Figures
from .namespace import fork_into_lab
from .nat import NatKind
from .net import Lab
from .stage import Seen, Stage, require_programs
from .story import Story

GUEST_MEMORY = "2048M"
GUEST_S = 600


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What `p2pvpn demo` was asked for."""

    nat_a: str = "port-restricted"
    nat_b: str = "port-restricted"
    hubs: int = 3
    rtt_ms: float = 30
    plane: str = "auto"
    json_file: str | None = None


def main(options: DemoOptions) -> int:
    """Perform it in namespaces of its own; 0 only if all was as it should be. Raises LocalError before it begins."""
    if options.plane == "kernel" and not kernel_has_esp():
        require_programs(in_guest=True)
        return _perform_in_guest(options)
    require_programs()
    status = fork_into_lab()
    if status is not None:
        return status
    code = 1
    try:
        code = 0 if perform(options) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001 (the forked process ends here, whatever happens)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kernel_has_esp() -> bool:
    """Whether the kernel plane can run here and now."""
    try:
        planes.probe()
    except LocalError:
        return False
    return True


def _perform_in_guest(options: DemoOptions) -> int:
    """This kernel has no ESP (or we may not touch it): perform on one that has, in User-Mode Linux."""
    if uml.is_inside():
        raise LocalError("the kernel of this guest has no ESP", hint="is its esp4 module there?")
    with tempfile.TemporaryDirectory(prefix="p2pvpn-demo-") as shared:
        result = Path(shared) / "figures.json"
        command = [sys.executable, "-m", "p2pvpn.cli.main", "demo", "--plane", "kernel", "--json", str(result)]
        command += ["--nat-a", options.nat_a, "--nat-b", options.nat_b]
        command += ["--hubs", str(options.hubs), "--rtt", f"{options.rtt_ms:g}"]
        guest = uml.Guest(memory=GUEST_MEMORY, timeout_s=GUEST_S, writable=(shared,))
        status = uml.run(command, guest, {"PYTHONPATH": str(Path(p2pvpn.__file__).parent.parent)})
        if options.json_file and result.exists():
            Path(options.json_file).write_bytes(result.read_bytes())
    return status


def perform(options: DemoOptions) -> bool:
    """The demo, inside a laboratory; whether all was as it should be."""
    story = Story()
    nats = {"a": NatKind(options.nat_a), "b": NatKind(options.nat_b)}
    figures = Figures(options.hubs, [options.nat_a, options.nat_b])
    ok = False
    with Lab() as lab:
        stage = Stage(lab, ROOT, hubs=options.hubs, nats=nats, rtt_ms=options.rtt_ms, plane=options.plane)
        demo = Demo(stage, story, figures)
        try:
            demo.run()
            ok = True
        except Seen as failure:
            hosts = failure.hosts or (stage.a, stage.b)
            story.failed(failure.expected, failure.seen, {host.name: stage.log_tail(host) for host in hosts})
        except P2pvpnError as error:
            story.failed("the laboratory to work", f"{error} {error.hint}".rstrip(), {})
        finally:
            demo.capture.close()
            if options.json_file:
                Path(options.json_file).write_text(figures.as_json())
    story.ended(ok)
    return ok
