"""Measurements against a peer in the same run: interleaved rounds, medians, ratios."""
