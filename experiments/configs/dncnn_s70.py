"""DnCNN against Gaussian noise of sigma 70, gray, at 60 % of the FLOPs.

Reproduces DHP-60: PSNR 24.91 dB on BSD68 at 5.65 G FLOPs and 0.34 M params (128x128 image); the
unpruned network has 24.93 dB, 9.13 G and 0.56 M (table 4 of the paper). `--config.target=0.4` is
after DHP-40 (24.89 dB), 0.2 after DHP-20 (24.84 dB). Here the FLOPs never exceed the target. Needs
two folders of images, gray or colour: to train on (DIV2K), and to test on (BSD68).

    python experiments/main.py --config=experiments/configs/dncnn_s70.py \\
        --config.data.dir=DIV2K/train --config.data.test_dir=BSD68
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("denoising")
    config.data.name = "photo_folder"
    config.target = 0.6
    return config
