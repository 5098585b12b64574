"""KITTI with a modern backbone: ConvNeXt-T with ImageNet weights, a wider head, bf16. For a GPU.

accelerate launch --num_processes 8 train.py configs/kitti_large.py data.root=/data/kitti

train.checkpoint_backbone=true saves memory, train.accumulate=N keeps the global batch on fewer GPUs.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from model import ModelConfig

config = Config(
    out="runs/kitti_large",
    best="Car/3d/moderate/AP_R40",
    data=DataConfig(
        root="data/kitti",
        train=(Source(split=("train",)),),
        val=(Source(split=("val",)),),
        scale=(0.7, 1.25),
        colour=0.2,
    ),
    model=ModelConfig(backbone="convnext_tiny", pretrained=True, drop_path=0.1, channels=256),
    train=TrainConfig(
        batch_size=8, epochs=60, lr=2e-4, weight_decay=0.05, warmup=500, eval_every=5, mixed_precision="bf16"
    ),
)
