"""Proof of the whole path: 16 real KITTI frames learnt by heart, from scratch, each counted 40 times in evaluation.

accelerate launch train.py configs/kitti_overfit.py data.root=/data/kitti
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from model import ModelConfig

frames = (Source(split=("train",), limit=16),)
config = Config(
    out="runs/kitti_overfit",
    data=DataConfig(root="data/kitti", train=frames, val=frames, flip=0.0),
    model=ModelConfig(backbone="resnet18", norm="batch"),
    train=TrainConfig(batch_size=4, steps=300, lr=3e-4, warmup=10, ema=0, eval_every=0, eval_repeat=40, save_every=100, log_every=10),
)
