"""Y1: one short, fixed job on the built-in world that every choice of the head is measured with (RESULTS.md).

accelerate launch train.py lab/config_y1.py seed=0

World 0, 1600 frames to train on and 400 held-out ones; ResNet-18 from scratch, 500 steps of 4 images. A difference
counts only beyond twice the spread over seeds that RESULTS.md states.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from losses import LossConfig
from model import ModelConfig

config = Config(
    out="runs/yardstick",
    data=DataConfig(
        root="data/synthetic",
        train=(Source(kind="synthetic", split=("train",), world_frames=1600),),
        val=(Source(kind="synthetic", split=("val",), world_frames=400),),
        min_height=12.0,
        max_occlusion=2,
        workers=1,
    ),
    model=ModelConfig(backbone="resnet18", size=(128, 416), strides=(8, 16), level_sizes=(64.0,), channels=64),
    loss=LossConfig(loss_bbox=2.0, loss_location=0.5, loss_centerness=0.5),
    train=TrainConfig(
        batch_size=4, steps=500, optimizer="muon", lr=8e-3, warmup=40, eval_every=0, log_every=20, save_every=500
    ),
)
