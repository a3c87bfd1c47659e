"""The namespace laboratory behind p2pvpn demo."""
