"""Y2: the same job as Y1 on a tenth of the frames, seen 12.5 times, so that over-fitting shows (RESULTS.md).

accelerate launch train.py lab/config_y2.py seed=0

Y1 (lab/config_y1.py) is blind to augmentation, averaging and regularisation: it sees each frame 1.25 times. World 0,
160 frames to train on and the 400 held-out ones of Y1; ResNet-18 from scratch, 500 steps of 4 images. A difference
counts only beyond twice the spread over seeds that RESULTS.md states.
"""

import dataclasses

from data import Source
from lab.config_y1 import config as y1

few = (Source(kind="synthetic", split=("train",), world_frames=160),)
config = dataclasses.replace(y1, out="runs/yardstick_few", data=dataclasses.replace(y1.data, train=few))
