"""Checks on instruction data: everything that a writer writes goes through `check` before it is stored."""

from filters.instruct.checks import CHECKS, CHECKS_VERSION, Rule, check

__all__ = ["CHECKS", "CHECKS_VERSION", "Rule", "check"]
