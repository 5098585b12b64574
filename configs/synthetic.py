"""The built-in world, from scratch: what `train.py` runs when it is given no config. Rendered on first use, no download.

accelerate launch train.py
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from model import ModelConfig

config = Config(
    out="runs/synthetic",
    data=DataConfig(
        root="data/synthetic",
        train=(Source(kind="synthetic", split=("train",)),),
        val=(Source(kind="synthetic", split=("val",)),),
    ),
    model=ModelConfig(backbone="resnet10t", size=(192, 640), channels=64),
    train=TrainConfig(batch_size=4, steps=700, lr=1e-3, warmup=50, eval_every=0, log_every=20, save_every=200),
)
