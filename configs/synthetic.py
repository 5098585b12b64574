"""The built-in world, from scratch: what `train.py` runs without a config. Rendered on first use, no download.

accelerate launch train.py

Everything here is small, because it must learn from nothing in minutes on 2 CPU cores: images at two thirds of their
size, a ten-layer ResNet without its last stage, and no effort spent on objects that are too low or too hidden to be
evaluated.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from losses import LossConfig
from model import ModelConfig

config = Config(
    out="runs/synthetic",
    data=DataConfig(
        root="data/synthetic",
        train=(Source(kind="synthetic", split=("train",), world_frames=1600),),
        val=(Source(kind="synthetic", split=("val",), world_frames=150),),
        min_height=12.0,
        max_occlusion=2,
        workers=1,
    ),
    model=ModelConfig(backbone="resnet10t", size=(128, 416), strides=(8, 16), level_sizes=(64.0,), channels=64),
    loss=LossConfig(loss_bbox=2.0, loss_location=0.5, loss_centerness=0.5),
    train=TrainConfig(
        batch_size=4, steps=840, optimizer="muon", lr=8e-3, warmup=40, eval_every=0, log_every=20, save_every=200
    ),
)
