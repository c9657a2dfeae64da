"""`python -m loopwise` is the `loopwise` command."""

import sys

from loopwise.cli import main

if __name__ == "__main__":
    sys.exit(main())
