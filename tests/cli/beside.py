"""Runs a command beside a daemon whose answer is given."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import p2pvpn
from p2pvpn.core.errors import LocalError
from p2pvpn.host.control import ControlServer


def beside(
    root: Path, asked: tuple[str, dict[str, Any]], answer: dict[str, Any] | LocalError | None, *command: str
) -> tuple[int, str, str]:
    """Run `command` beside a daemon that is `asked` so and answers so, or beside none; its code and what it printed."""

    async def handle(method: str, params: dict[str, Any]) -> object:
        if method == "version":
            return p2pvpn.__version__
        assert (method, params) == asked
        if isinstance(answer, LocalError):
            raise answer
        return answer

    async def run() -> tuple[int, str, str]:
        server = ControlServer(root / "control.sock", handle)
        if answer is not None:
            await server.start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "p2pvpn.cli.main", *command),
            env={**os.environ, "P2PVPN_RUNTIME_DIR": str(root), "COLUMNS": "140"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        await server.close()
        return process.returncode or 0, out.decode(), err.decode()

    return asyncio.run(run())
