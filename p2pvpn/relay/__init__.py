"""The relay: pairs of UDP ports on a hub that pass opaque bytes between two peers, and how peers bind to them.

An allocation is two ports, one per side. A side proves that it holds the side's ticket and receives at the address it
sends from; that source is *bound* then. Bytes from the bound source at one port leave unchanged from the other port to
the source bound there. Nothing is framed, so the kernel's ESP passes as it is, and the relay reads nothing of it.

`wire` ticket and Binding requests, `binding` their STUN messages, `limits` every bound of the service with its reason,
`server` the hub's machine, `client` the peer's.
"""
