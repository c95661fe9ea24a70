"""ResNet-20 on CIFAR-10, pruned from trained weights in five epochs.

A search from trained weights (`fade`) has two epochs, and training three, at one learning rate that
falls to zero. At most half the FLOPs are left; `--config.target=0.25` leaves a quarter. It begins
with a network of 11.62 % error that a clone of the library has, or with that of a finished
`baseline` run:

    python experiments/main.py --config=experiments/configs/resnet20_from_trained.py
    python experiments/main.py --config=experiments/configs/resnet20_from_trained.py \\
        --config.model.weights=None --config.source=runs/resnet20-baseline

A cut at once, in as many epochs:

    python experiments/main.py --config=experiments/configs/resnet20_from_trained.py \\
        --config.method=group_norm --config.converge.epochs=5 \\
        --config.converge.learning_rate=0.05 --config.converge.warmup=0.25
"""

from pathlib import Path

from dhp_jax import config as dhp_config

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"  # of a clone
TRAINED = RESULTS / "from_trained_resnet20.safetensors"


def get_config():
    config = dhp_config.default()
    config.method = "fade"
    config.model.update(depth=20, weights=str(TRAINED) if TRAINED.exists() else None)
    config.target = 0.5
    config.batch_size = 256
    config.optimizer.update(nesterov=True, weight_decay=5e-4)
    config.search.update(epochs=2, learning_rate=0.05, drops=(), warmup=0.25)
    # A cosine from 0.05 over all five epochs has 0.033 after two.
    config.converge.update(epochs=3, learning_rate=0.033, schedule="cosine", drops=())
    return config
