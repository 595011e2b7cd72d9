"""`python -m singd_ext.bench`."""

import sys

from .cli import main

sys.exit(main())
