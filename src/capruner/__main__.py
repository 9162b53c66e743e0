"""``python -m capruner``."""

import sys

from capruner.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
