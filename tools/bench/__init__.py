"""Throughput of the user plane, side by side with another VPN: `python -m tools.bench`."""
