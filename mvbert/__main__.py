"""`python -m mvbert` is the same as `mvbert`."""

import sys

from mvbert.cli import main

sys.exit(main())
