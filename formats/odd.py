"""What is odd in files: whether it is taken, and the sentences that tell of it. Imported where something is odd."""

import re

from formats.kitti import COLUMNS, FILLS
from scene.frames import PLAUSIBLE, UserError, opened

NO_BOX = [-1.0, -1.0, -1.0, -1000.0, -1000.0, -1000.0, -10.0]  # KITTI's own, for h, w, l, x, y, z, rotation_y
TITLES = {"box": "2D box is", "size": "h, w, l are", "center": "x, y, z are", "yaw": "rotation_y is"}  # of COLUMNS
TAKEN = {  # of a KITTI label: from which field after the name to which, and what becomes of an odd one
    "truncation": (0, 1, "neither from 0 to 1 nor -1, and counts as unknown: other tools write flags, track ids there"),
    "occlusion": (1, 2, "none of -1, 0, 1, 2, 3, and counts as unknown: other tools write shares, flags there"),
    "3D box": (7, 14, "not known: an ignore region in training, and evaluated as officially, missed in BEV and 3D"),
}
DISTORTION = re.compile(r"[dD](_?\d+)?|(?i:(?!un|no)\w*distort\w*|dist(_?coeff?\w*)?)|k[1-6]|p[12]|xi")  # such names
DARK = 64  # of 255, which 14 bits of 16 do not pass


def accept(row, name, place, odd):
    """The row of a KITTI label, 15 numbers, with -1 for an odd truncation or occlusion, `NO_BOX` for an unknown 3D box.

    That is one with sides or a place of 0, -1 or -1000. odd: a list that gets (title in TAKEN, place, numbers); without
    it a box of which some sides are known is refused. Raises ValueError for what is not plausible, as only labels must
    be: detectors write empty 2D boxes, and `NO_BOX`, and the evaluator has rules for both.
    """
    sides = [side in FILLS for side in row[7:10]]
    flat = all(sides) or (any(sides) and odd is not None) or (row[12] in FILLS and row[10] == row[11] == row[12])
    new = row
    if name != "DontCare":
        truncation, occlusion = row[0] if 0 <= row[0] <= 1 else -1.0, row[1] if row[1] in (0, 1, 2, 3) else -1.0
        new = [truncation, occlusion, *row[2:7], *(NO_BOX if flat else row[7:14]), row[14]]
    for key, (start, stop) in COLUMNS.items():
        low, high = PLAUSIBLE[key]
        values = row[start:stop]
        if not low <= min(values) <= max(values) <= high and (key == "box" or not (flat or name == "DontCare")):
            values = ", ".join(f"{value:g}" for value in values)
            raise ValueError(f"{TITLES[key]} {values}, expected numbers from {low:g} to {high:g}")
    x1, y1, x2, y2 = row[3:7]
    if x2 < x1 or y2 < y1:
        raise ValueError(f"2D box {x1:g} {y1:g} {x2:g} {y2:g} is inside out, expected x1 <= x2, y1 <= y2")
    for title, (start, stop, _) in TAKEN.items() if odd is not None else ():
        if new[start:stop] != row[start:stop] or (title == "3D box" and flat and name != "DontCare"):
            odd.append((title, place, row[start:stop]))
    return new


def describe_labels(odd):
    """Sentences on the rows of label files that `accept` has collected."""
    sentences = []
    for title, (*_, about) in TAKEN.items():
        if found := [(place, values) for kind, place, values in odd if kind == title]:
            place, values = found[0]
            first = f"{place} has {' '.join(f'{value:g}' for value in values)}"
            sentences.append(f"{title} of {len(found)} labels is {about}; the first: {first}")
    return sentences


def distortion_problem(key, value=1):
    """What is wrong where a camera's description has a key with such a value, text or numbers; None when nothing is."""
    if not DISTORTION.fullmatch(key) or not re.search("[1-9]", str(value)):
        return None
    if key.lower() == "dist" and len(str(value).split()) == 1:  # a distance
        return None
    advice = "undistort the images (cv2.undistort), take the K that they then have, and leave this out"
    return f"{key} is {str(value).strip()[:80]}: it tells of distorted images, expected undistorted ones; {advice}"


def refuse_distortion(path, lines):
    """Raises UserError for the first line of a calibration file that tells of distortion."""
    for number, line in enumerate(lines, 1):
        key, _, rest = line.partition(":")
        if problem := distortion_problem(key.strip(), rest):
            raise UserError(f"{path}:{number}: {problem}")


def dark_problem(image, pixels):
    """A sentence where an image (h, w, 3) of 16 bits uses so few of them that it looks black; None where it does not.

    image: as `Frame.image`. Raises what `opened` raises.
    """
    brightest = int(pixels.max())
    if brightest > DARK:
        return None
    with opened(image) as picture:
        if ";16" not in str(picture.tile):  # the mode in which Pillow reads the file
            return None
    values = f"its 16-bit values reach about {257 * brightest} of 65535, as those of 10 to 14 bits do"
    return f"{image}: {values}, so that it looks black; multiply them, 12-bit ones by 16"
