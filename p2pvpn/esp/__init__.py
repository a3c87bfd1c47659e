"""ESP (RFC 4303): the pure per-packet code."""
