"""Lets `python -m compress` do what the `compress` command does."""

from compress.cli.commands import main

main()
