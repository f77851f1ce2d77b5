"""`python -m sharded_avg` is `sharded-avg`."""

import sys

from .cli import main

sys.exit(main())
