"""`python -m fedspallm_appfl` is `fedspallm`."""

import sys

from fedspallm_appfl.cli import main

sys.exit(main())
