"""Frame-free relaying over pairs of UDP ports, sans-IO."""
