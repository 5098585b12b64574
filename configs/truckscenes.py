"""MAN TruckScenes, twelve classes with velocity and attribute, all four cameras: ResNet-50 with ImageNet weights, bf16.

accelerate launch --num_processes 8 train.py configs/truckscenes.py data.root=/data/man-truckscenes

data.root holds the tables (data.train and data.val name a version where there are several) and samples/. This run was
never made: no accuracy is claimed. Values are those of configs/nuscenes.py, whose comments name their sources; what
differs is said here.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from formats.truckscenes import DIALECT
from model import ModelConfig

classes = tuple(DIALECT.ranges)
config = Config(
    out="runs/truckscenes",
    best="NDS",
    data=DataConfig(
        root="data/man-truckscenes",
        train=(Source(kind="nuscenes", dialect="truckscenes", split=("train",)),),  # 523 scenes of 20 s
        val=(Source(kind="nuscenes", dialect="truckscenes", split=("val",)),),  # 75
        # Looks like a class that is trained, counts as none; and bicycles in a rack count neither way.
        neighbours=(
            "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.train", "static_object.bicycle_rack"
        ),
        scale=(0.75, 1.25),
        colour=0.2,
        workers=8,
    ),
    model=ModelConfig(
        backbone="resnet50",
        pretrained=True,
        norm="frozen",
        size=(480, 992),  # half of 1980x943, in whole cells of stride 32; objects count up to 150 m, so try all of it
        level_sizes=(48.0, 96.0),  # as configs/nuscenes.py has them at 0.56 of the picture's size
        channels=256,
        classes=classes,
        velocity=True,
        attributes={name: DIALECT.attributes[name] for name in classes},
        score_threshold=0.01,
    ),
    train=TrainConfig(
        batch_size=8,
        epochs=24,
        optimizer="muon",
        lr=4e-3,
        warmup=500,
        eval_every=2,
        save_every=1000,
        mixed_precision="bf16",
    ),
)  # fmt: skip
