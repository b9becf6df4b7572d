"""`python -m esokern` is the `esokern` command."""

import sys

from esokern.cli import main

sys.exit(main())
