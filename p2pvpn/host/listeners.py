"""The TCP ports of this machine as a hub: one for all networks, unless they were granted different ones."""

from __future__ import annotations

from .enrol_server import Desk
from .listener import Listener
from .streams import HostStreams


class Listeners:
    """Opens a port with its first network and closes it with the last one."""

    def __init__(self, streams: HostStreams) -> None:
        self._streams = streams
        self._by_port: dict[int, Listener] = {}

    async def add(self, port: int, desk: Desk) -> None:
        """Serve a network at this port. Raises LocalError when the port cannot be had."""
        listener = self._by_port.get(port)
        if listener is None:
            listener = Listener(self._streams)
            await listener.listen(None, port)
            self._by_port[port] = listener
        listener.add(desk)

    async def remove(self, desk: Desk) -> None:
        """Serve it no more."""
        for port, listener in list(self._by_port.items()):
            listener.remove(desk)
            if listener.is_idle:
                del self._by_port[port]
                await listener.close()
