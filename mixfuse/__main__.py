"""`python -m mixfuse`: the same as the `mixfuse` command, for launchers that start modules."""

import sys

from mixfuse.cli.entry import main

sys.exit(main())
