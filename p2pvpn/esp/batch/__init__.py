"""Many packets at once, with numpy; this package is its only importer, and the user plane's worker imports it late.

    outbound   super-packet -> `Cutter` --+--> rows of plaintext -> `Sealing` -> datagrams, one behind the other
               slots of the device -> `Slots` --+
    inbound    datagrams, one behind the other -> `Opening` -> rows of plaintext -> `Joiner` -> super-packets

A row is one packet with its ESP padding. Rows of a batch have one size, so that a header field of all rows is one
strided array, and what costs a microsecond by itself costs it once for 45 packets. Nothing here decides on policy,
counts packets or touches a descriptor, and `EspEngine` does one by one whatever does not fit these patterns.
"""
