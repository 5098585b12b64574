"""16 real KITTI frames learnt by heart, from scratch, without augmentation: impossible with one wrong sign.

accelerate launch train.py configs/kitti_overfit.py data.root=/data/kitti

Each frame counts 40 times in evaluation, because R40 of n counted objects cannot exceed (n - 1) / 40. 300 steps of 4
images are the budget that mmdetection3d's FCOS3D was measured with; train.steps sets another one. The corner loss is
on, as it was for the figures of RESULTS.md, "Exactness".
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from losses import LossConfig
from model import ModelConfig

frames = (Source(split=("train",), limit=16),)
config = Config(
    out="runs/kitti_overfit",
    best="Car/3d/moderate/AP_R40",
    data=DataConfig(root="data/kitti", train=frames, val=frames, flip=0.0),
    model=ModelConfig(backbone="resnet18", norm="batch"),
    loss=LossConfig(loss_bbox=2.0, loss_regress=0.5),
    train=TrainConfig(
        batch_size=4,
        steps=300,
        lr=1e-3,
        beta2=0.99,
        warmup=10,
        ema=0,
        eval_every=0,
        eval_repeat=40,
        save_every=100,
        log_every=10,
    ),
)
