"""How much of a text can be had from what crosses the cuts: attacks on real messages, with controls."""
