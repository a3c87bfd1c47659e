"""The namespace laboratory: a small Internet of real kernels' namespaces, behind `p2pvpn demo` and the tests."""
