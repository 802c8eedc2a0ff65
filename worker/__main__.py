"""``python -m worker``: the workers of one machine under a supervisor (``worker.app`` is one worker alone)."""

import sys

from worker.supervisor import main

sys.exit(main())
