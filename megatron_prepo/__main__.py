# PYTHON_ARGCOMPLETE_OK
"""``python -m megatron_prepo``."""

import sys

from megatron_prepo.cli import main

if __name__ == "__main__":
    sys.exit(main())
