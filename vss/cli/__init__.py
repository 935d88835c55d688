"""The command line; `vss.cli.main` is the entry point."""
