"""Prunes a network as a configuration says; experiments/configs has those of the paper.

Example: python experiments/main.py --config=experiments/configs/resnet20.py --config.target=0.38
"""

import sys

if __name__ == "__main__" and sys.stderr.isatty():  # the imports take a second or two
    print("loading    dhp_jax", file=sys.stderr, flush=True)

from dhp_jax.commands import leave
from dhp_jax.pipeline.flags import define, main

__all__ = ["define", "main"]


if __name__ == "__main__":
    leave(main(sys.argv))
