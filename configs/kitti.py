"""KITTI, three classes, ResNet-18 with ImageNet weights.

accelerate launch --num_processes 8 train.py configs/kitti.py data.root=/data/kitti

Optimizer and learning rate did best on 60 real frames at a global batch of 4, width 128 and the scale on the yardsticks
(RESULTS.md); schedule, levels and colour are customary. On all of KITTI, and at a global batch of 64, they were not
tried.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from model import ModelConfig

config = Config(
    out="runs/kitti",
    best="Car/3d/moderate/AP_R40",
    data=DataConfig(
        root="data/kitti",
        train=(Source(split=("train",)),),
        val=(Source(split=("val",)),),
        scale=(0.7, 1.25),
        colour=0.2,
    ),
    model=ModelConfig(backbone="resnet18", pretrained=True),
    train=TrainConfig(batch_size=8, epochs=60, optimizer="muon", lr=4e-3, warmup=500, eval_every=5),
)
