"""Where the machine is touched: sockets, TUN, netlink, workers, control socket."""
