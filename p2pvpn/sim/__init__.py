"""A simulated Internet on virtual time."""
