"""Telling people what happens and what came out: progress, logs, tables, the funnel."""
