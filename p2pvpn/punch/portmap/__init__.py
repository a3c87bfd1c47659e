"""Ports that a router opens for us: PCP (RFC 6887), NAT-PMP (RFC 6886) and UPnP's Internet Gateway Device."""
