"""`batch-client` and `python -m batch_client`."""

import sys

from batch_client.cli import main


def entry_point() -> None:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry_point()
