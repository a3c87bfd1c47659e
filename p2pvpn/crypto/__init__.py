"""Cryptographic algorithms under the names IKE gives them; the only importer of `cryptography`'s primitives."""
