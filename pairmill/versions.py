"""Snapshots over time: what changed between two, going back to one, and which may go."""
