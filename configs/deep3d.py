"""All twelve losses on KITTI: the stack of the system that deep3d succeeds, each old switch a key (token in brackets).

accelerate launch --num_processes 8 train.py configs/deep3d.py data.root=/data/kitti
"""

from config import Config, TrainConfig
from data import DataConfig, Source
from losses import LossConfig
from model import ModelConfig

config = Config(
    out="runs/deep3d",
    best="Car/3d/moderate/AP_R40",
    data=DataConfig(
        root="data/kitti",
        train=(Source(split=("train",)),),
        val=(Source(split=("val",)),),
        neighbours=("Van", "Person_sitting"),  # [ig] regions that are neither object nor background; () switches it off
        scale=(0.9, 1.2),  # [rs] random scale; (1, 1) switches it off
        colour=0.2,
    ),
    model=ModelConfig(
        backbone="resnet18",
        pretrained=True,
        projected_center=True,  # [pc] cells around the projected 3D centre; False: around the 2D box's centre
        predict_yaw=True,  # [pa] alpha and yaw as two outputs
    ),
    loss=LossConfig(  # [lw] every loss has its weight
        loss_cls=1.0,
        loss_bbox=1.0,
        loss_full_bbox=0.5,
        loss_centerness=1.0,
        loss_size=1.0,
        loss_location=1.0,
        loss_y=0.1,
        loss_regress=0.5,  # [rg] 0 switches it off
        loss_direction=0.5,
        loss_cos=1.0,
        loss_alpha_constrain=0.5,  # needs predict_yaw
        loss_relative=0.2,  # [rl] 0 switches it off
    ),
    train=TrainConfig(batch_size=8, epochs=60, optimizer="muon", lr=4e-3, warmup=500, eval_every=5),
)
