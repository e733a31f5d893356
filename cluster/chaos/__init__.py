"""The fault benchmark: trains and serves while actors are killed, frozen and cut off by a seeded schedule."""
