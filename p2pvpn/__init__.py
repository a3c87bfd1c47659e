"""p2pvpn: an auto-discovery VPN (RFC 7018) over standard IPsec."""

__version__ = "0.1.0"
