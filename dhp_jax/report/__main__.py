"""`python -m dhp_jax.report RUN [RUN ...]`."""

import sys

from dhp_jax import command
from dhp_jax.report import main

sys.exit(command.run(main))
