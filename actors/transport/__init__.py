"""Links between a router and an expert actor: one contract, one file an implementation."""
