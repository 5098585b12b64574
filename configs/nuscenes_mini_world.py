"""The built-in world from six cameras, in nuScenes' layout, from scratch: training and NDS without any download.

accelerate launch train.py configs/nuscenes_mini_world.py

Small as configs/synthetic.py is, for minutes on 2 CPU cores. A class without an object counts with AP 0, and these 240
pictures of mini_val show no truck, no trailer and no construction vehicle: mAP is at most 0.7.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from formats.nuscenes import ATTRIBUTES
from losses import LossConfig
from model import ModelConfig

classes = tuple(name for name in ATTRIBUTES if name != "construction_vehicle")
config = Config(
    out="runs/nuscenes_mini_world",
    best="NDS",
    data=DataConfig(
        root="data/synthetic",
        train=(Source(kind="synthetic", split=("mini_train",), world_frames=960),),
        val=(Source(kind="synthetic", split=("mini_val",), world_frames=240),),
        min_height=8.0,
        workers=1,
    ),
    model=ModelConfig(
        backbone="resnet10t",
        size=(224, 400),
        strides=(8, 16),
        level_sizes=(48.0,),
        channels=64,
        classes=classes,
        velocity=True,
        attributes={name: ATTRIBUTES[name] for name in classes},
        score_threshold=0.02,
    ),
    loss=LossConfig(loss_bbox=2.0, loss_location=0.5, loss_centerness=0.5),
    train=TrainConfig(
        batch_size=4, steps=600, optimizer="muon", lr=8e-3, warmup=40, eval_every=0, log_every=20, save_every=600
    ),
)
