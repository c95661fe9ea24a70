"""U-Net against Gaussian noise of sigma 70, gray, at 60 % of the FLOPs.

Reproduces DHP-60: PSNR 25.14 dB on BSD68 at 2.11 G FLOPs and 4.76 M params (128x128 image); the
unpruned network has 25.17 dB, 3.41 G and 7.76 M (table 4 of the paper). `--config.target=0.4` is
after DHP-40 (25.12 dB), 0.2 after DHP-20 (25.04 dB). Here the FLOPs never exceed the target. Needs
two folders of images, gray or colour: to train on (DIV2K), and to test on (BSD68).

    python experiments/main.py --config=experiments/configs/unet_s70.py \\
        --config.data.dir=DIV2K/train --config.data.test_dir=BSD68
"""

from dhp_jax import config as dhp_config


def get_config():
    config = dhp_config.default("denoising")
    config.data.name = "photo_folder"
    config.model = {"name": "unet", "depth": 5, "width": 1.0}
    config.batch_size = 16
    config.task.patch = 128
    config.target = 0.6
    return config
