"""`python -m sharded_avg` is `sharded-avg`."""

import sys

from .commands.cli import main

sys.exit(main())
