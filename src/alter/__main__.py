"""`python -m alter`, so that `accelerate launch -m alter unlearn …` works."""

import os
import sys

# `-m` puts the current folder first, where a json.py or random.py would be imported in the library's place
if sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from alter.cli import main

sys.exit(main())
