"""`python -m rhapsody_mcp` is the command `rhapsody-mcp`."""

import sys

from rhapsody_mcp.cli import main

if __name__ == "__main__":
    sys.exit(main())
