"""What T4 data sets (Autoware; tier4/t4-devkit 0.8.0) have otherwise than nuScenes: folders, free names, velocities.

They have no official evaluator: nuScenes' formulas and ranges judge. Their pictures are distorted: docs/formats.md.
"""

import dataclasses

from formats.nuscenes import NUSCENES

VEHICLE = ("vehicle_state.driving", "vehicle_state.moving", "vehicle_state.stopped", "vehicle_state.parked")
CYCLE = ("cycle_state.with_rider", "cycle_state.without_rider")
PERSON = ("pedestrian_state.standing", "pedestrian_state.moving", "pedestrian_state.sitting")
DIALECT = dataclasses.replace(
    NUSCENES,
    tables=("annotation", "*/annotation"),
    splits={}, versions={},
    classes=NUSCENES.classes | {"vehicle.bus": "bus", "motorbike": "motorcycle"} | dict.fromkeys(
        ("construction_worker", "police_officer", "pedestrian.adult", "pedestrian.child",
         "pedestrian.construction_worker", "pedestrian.police_officer"), "pedestrian"
    ),
    ranges={name: reach for name, reach in NUSCENES.ranges.items() if name != "construction_vehicle"},
    attributes=dict.fromkeys(("car", "truck", "bus", "trailer"), VEHICLE)
    | {"pedestrian": PERSON, "motorcycle": CYCLE, "bicycle": CYCLE, "traffic_cone": (), "barrier": ()},
    usual={},
    reference=("LIDAR_CONCAT", "LIDAR_TOP"),
    occlusion=NUSCENES.occlusion | {"full": 0, "most": 1, "partial": 2, "none": 3},
    velocities=True, several=True,
)  # fmt: skip
