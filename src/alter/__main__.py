"""`python -m alter`, so that `accelerate launch -m alter unlearn …` works."""

import sys

from alter.cli import main

sys.exit(main())
