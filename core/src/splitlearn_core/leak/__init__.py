"""How much of a text can be recovered from what crosses the cuts: attacks on real messages, with controls."""
