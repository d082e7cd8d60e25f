"""Takedown: removes pairs for good from every table, version and export."""
