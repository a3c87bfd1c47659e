"""Signed records and the Kademlia overlay of hubs that keeps them."""
