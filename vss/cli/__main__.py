"""`vss` and `python -m vss.cli`: a Ctrl-C while the command line is being imported ends as one does later."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; how a command ends is said by `vss.cli.exits`."""
    try:
        from vss.cli.main import main as start

        start()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything was begun; the same command starts anew\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
