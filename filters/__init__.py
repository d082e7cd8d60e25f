"""Policy: what is measured of a pair, and which pairs are kept."""
