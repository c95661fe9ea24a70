"""SRResNet, super-resolution by 4, at 60 % of the FLOPs.

Reproduces DHP-60: PSNR 31.97 / 28.47 / 27.48 / 25.76 dB on Set5 / Set14 / B100 / Urban100 at 20.29
G FLOPs and 0.95 M params (128x128 input); the unpruned network has 32.03 / 28.50 / 27.52 / 25.88
dB, 32.83 G and 1.54 M (table 3 of the paper). `--config.target=0.4` is after DHP-40 (31.90 / 28.45
/ 27.47 / 25.72 dB), 0.2 after DHP-20 (31.77 / 28.34 / 27.40 / 25.55 dB). Here the FLOPs never
exceed the target. Needs a folder of photographs to train on (DIV2K) and one to test on, of high-
resolution images alone or of pairs with the low-resolution ones.

    python experiments/main.py --config=experiments/configs/srresnet_x4.py \\
        --config.data.dir=DIV2K/train --config.data.test_dir=Set5
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("super_resolution")
    config.data.name = "photo_folder"
    config.target = 0.6
    return config
