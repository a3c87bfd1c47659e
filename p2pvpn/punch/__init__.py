"""ICE-style hole punching (RFC 8445), sans-IO."""
