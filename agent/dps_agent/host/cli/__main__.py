"""`python -m dps_agent.host.cli`, the same as the installed command."""

import sys

from dps_agent.host.cli import main

if __name__ == "__main__":
    sys.exit(main())
