"""Runs the program."""

from .program import main

main()
