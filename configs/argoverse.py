"""Argoverse 2, 26 classes, seven ring cameras, one of them portrait: ResNet-50 with ImageNet weights, bf16.

accelerate launch --num_processes 8 train.py configs/argoverse.py data.root=/data/av2
sbatch sbatch.sh configs/argoverse.py data.root=/data/av2

data.root holds sensor/{train,val}/LOG/, each log with its tables, sensors/cameras/ and map/; lidar is not read, and
`pip install pyarrow` is. This run was never made: no accuracy is claimed. Where nothing is said, values are those of
configs/nuscenes.py, which was not run either. Wilson et al., Argoverse 2, NeurIPS Datasets 2021.
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from formats.argoverse import CLASSES
from model import ModelConfig

config = Config(
    out="runs/argoverse",
    best="CDS",
    data=DataConfig(
        root="data/av2",
        train=(Source(kind="argoverse", split=("train",)),),  # 700 logs of about 156 sweeps: 760,000 images
        val=(Source(kind="argoverse", split=("val",)),),  # 150 logs, 164,000 images: all count officially
        # Annotated and not evaluated; each looks like one of the 26.
        neighbours=("ANIMAL", "OFFICIAL_SIGNALER", "RAILED_VEHICLE", "TRAFFIC_LIGHT_TRAILER"),
        min_height=4.0,  # half a cell of the finest level: a car 150 m away is 7 px high there
        scale=(0.75, 1.25),
        colour=0.2,
        workers=8,
    ),
    model=ModelConfig(
        backbone="resnet50",
        pretrained=True,
        norm="frozen",
        size=(640, 832),  # 2048x1550 at 0.41, and 1550x2048, the front camera, at 0.31, which fills 58 % of it
        level_sizes=(54.0, 108.0),
        channels=256,
        classes=CLASSES,
        score_threshold=0.01,  # 100 boxes of a class and sweep are counted
    ),
    train=TrainConfig(
        batch_size=8,
        epochs=5,  # neighbouring sweeps are .1 s apart: as many steps as configs/nuscenes.py makes in 24 epochs
        optimizer="muon",
        lr=4e-3,
        warmup=500,
        save_every=1000,
        mixed_precision="bf16",
    ),
)
