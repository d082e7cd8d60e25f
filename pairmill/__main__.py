"""`python -m pairmill`."""

from pairmill.cli import main

main()
