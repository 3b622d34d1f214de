"""`python -m trainer COMMAND ...` is `trivium COMMAND ...`."""

import sys

from trainer.cli import main

sys.exit(main())
