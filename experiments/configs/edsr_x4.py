"""EDSR of 8 blocks and 128 channels, super-resolution by 4, at 60 % of the FLOPs.

Reproduces DHP-60: PSNR 31.99 / 28.52 / 27.53 / 25.92 dB on Set5 / Set14 / B100 / Urban100 at 55.67
G FLOPs and 2.28 M params (128x128 input); the unpruned network has 32.10 / 28.55 / 27.55 / 26.02
dB, 90.37 G and 3.70 M (table 3 of the paper). `--config.target=0.4` is after DHP-40 (32.01 / 28.49
/ 27.52 / 25.86 dB), 0.2 after DHP-20 (31.94 / 28.42 / 27.47 / 25.69 dB). Here the FLOPs never
exceed the target. Needs a folder of photographs to train on (DIV2K) and one to test on, of high-
resolution images alone or of pairs with the low-resolution ones.

    python experiments/main.py --config=experiments/configs/edsr_x4.py \\
        --config.data.dir=DIV2K/train --config.data.test_dir=Set5
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("super_resolution")
    config.data.name = "photo_folder"
    config.model = {"name": "edsr", "blocks": 8, "width": 1.0, "prune_upsampler": True}
    config.task.patch = 192
    config.target = 0.6
    return config
