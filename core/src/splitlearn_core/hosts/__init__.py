"""Components in other processes and on other machines: the protocol, its carriers, and both of its ends."""
