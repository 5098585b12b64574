"""nuScenes, ten classes with velocity and attribute, all six cameras: ResNet-50 with ImageNet weights, bf16.

accelerate launch --num_processes 8 train.py configs/nuscenes.py data.root=/data/nuscenes
sbatch sbatch.sh configs/nuscenes.py data.root=/data/nuscenes

data.root holds v1.0-trainval/ and samples/. This run was never made: no accuracy is claimed. Estimated, not measured:
4 GB a GPU, and 2 to 3 hours on eight A100, as long as the loader's workers give 1500 images a second. Where other
detectors are named, the values are those of their published configs: FCOS3D and PGD (mmdetection3d), DD3D
(TRI-ML/dd3d, dd3d_nusc_dla34), EPro-PnP (tjiiv-cprg, epropnp_det_v1b_220411).
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from formats.nuscenes import ATTRIBUTES
from model import ModelConfig

config = Config(
    out="runs/nuscenes",
    best="NDS",
    data=DataConfig(
        root="data/nuscenes",
        train=(Source(kind="nuscenes", version="v1.0-trainval", split=("train",)),),  # 168,780 images
        val=(Source(kind="nuscenes", version="v1.0-trainval", split=("val",)),),  # 36,114 images
        # Looks like a car, counts as none; and bicycles in a rack count neither way.
        neighbours=("vehicle.emergency.ambulance", "vehicle.emergency.police", "static_object.bicycle_rack"),
        scale=(0.75, 1.25),  # DD3D: short sides of 640 to 1152, tested at 896; FCOS3D, PGD and EPro-PnP only flip
        colour=0.2,
        workers=8,
    ),
    model=ModelConfig(
        backbone="resnet50",  # FCOS3D and EPro-PnP: ResNet-101 with deformable convolutions; DD3D: DLA-34 and VoVNet-99
        pretrained=True,
        norm="frozen",  # all four
        size=(512, 896),  # a third of the pixels that all four see; model.size=896,1600 costs three times as much
        # FCOS3D, PGD and EPro-PnP pass from stride 8 to 16 and 32 where the farthest side of the box is 48 and 96 px
        # from the cell: boxes of about twice that, here at 0.56 of the size. All four have strides 64 and 128, too.
        level_sizes=(54.0, 108.0),
        channels=256,  # all four
        classes=tuple(ATTRIBUTES),
        velocity=True,
        attributes=ATTRIBUTES,
        score_threshold=0.01,  # mmdetection3d's for nuScenes; 500 boxes a sample are counted
    ),
    train=TrainConfig(
        batch_size=8,  # 64 in all, as DD3D; FCOS3D 16, PGD 32
        epochs=24,  # FCOS3D and EPro-PnP 12, PGD 12 or 24 (1.9 mAP better), DD3D 45
        optimizer="muon",  # with the learning rate of configs/kitti.py; not tried here
        lr=4e-3,
        warmup=500,  # FCOS3D; DD3D 2000
        eval_every=2,
        save_every=1000,
        mixed_precision="bf16",
    ),
)
