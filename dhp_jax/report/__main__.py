"""`python -m dhp_jax.report RUN [RUN ...]`."""

import sys

from dhp_jax.report import main

sys.exit(main(sys.argv[1:]))
