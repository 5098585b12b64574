#!/usr/bin/env bash
# A telephone's video (H.264 stored on its side, with a display matrix of 90 degrees) through seven Python readers:
# av 18.1.0, imageio 2.38.1 (plugins pyav and FFMPEG; imageio-ffmpeg 0.8.1), opencv-python-headless 5.0.0.93, decord 0.6.0, PIMS 0.7, moviepy 2.2.1.
#
# Guess: all give the picture as a player shows it, or all give it as it is stored.
# What they do: three answers. OpenCV, decord and imageio's FFMPEG turn it (192 wide, 320 high); av, imageio's pyav plugin and PIMS do
# not (320 x 192, on its side); moviepy gives it **upright, and squeezed into the stored size**: 320 x 192 with width and height scaled
# by 1.67 and .6, `rotation` 0, no warning. A focal length measured with one reader is wrong with another, and with moviepy fx and fy differ by 2.8.
# What it means here: predict.py turns what av stores, by frame.rotation; frames extracted by other means must be looked at before K is trusted.
#
# Seen (Python 3.11; height, width):
#   opencv (320, 192), decord (320, 192), imageio FFMPEG (320, 192), av (192, 320), imageio pyav (192, 320), PIMS (192, 320),
#   moviepy (192, 320): upper left green, upper right blue, lower half red, which is the upright picture
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 imageio==2.38.1 imageio-ffmpeg==0.8.1 opencv-python-headless==5.0.0.93 decord==0.6.0 \
    pims==0.7 moviepy==2.2.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY' 2> errors.txt || { cat errors.txt >&2; exit 1; }
import subprocess

import av
import cv2
import decord
import imageio.v3 as imageio
import imageio_ffmpeg
import moviepy
import numpy as np
import pims

pixels = np.zeros((192, 320, 3), np.uint8)  # stored: left half red, upper right green, lower right blue
pixels[:, :160], pixels[:96, 160:], pixels[96:, 160:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
with av.open("stored.mp4", "w") as container:
    stream = container.add_stream("libx264", rate=10)
    stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
    for _ in range(5):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
    container.mux(stream.encode())
turn = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", "stored.mp4", "-c", "copy", "phone.mp4"]
subprocess.run(turn, check=True)

path = "phone.mp4"
clip = moviepy.VideoFileClip(path)
squeezed = clip.get_frame(0)
pictures = {
    "opencv": cv2.VideoCapture(path).read()[1],
    "decord": decord.VideoReader(path)[0].asnumpy(),
    "imageio FFMPEG": imageio.imread(path, index=0, plugin="FFMPEG"),
    "av": next(av.open(path).decode(video=0)).to_ndarray(format="rgb24"),
    "imageio pyav": imageio.imread(path, index=0, plugin="pyav"),
    "PIMS": pims.open(path)[0],
    "moviepy": squeezed,
}
shapes = {name: picture.shape[:2] for name, picture in pictures.items()}
colours = ["RGB"[int(squeezed[row, column].argmax())] for row, column in ((40, 80), (40, 240), (150, 80), (150, 240))]
print(shapes, "moviepy:", colours, clip.size, clip.rotation)
upright, stored = (320, 192), (192, 320)
expected = dict(zip(pictures, [upright] * 3 + [stored] * 4))
assert shapes == expected, f"changed: expected {expected}"
assert (colours, clip.size, clip.rotation) == (list("GBRR"), [320, 192], 0), "changed: moviepy's picture"
PY
echo "as stated"
