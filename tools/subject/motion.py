"""The motion: pose (15) and expression (50) of every frame, smooth in time, ten frames a second."""

from dataclasses import dataclass

import numpy as np

TRAIN_FRAMES, TEST_FRAMES = 96, 24
LARGEST_YAW = np.radians(40)
CLOSED_JAW = -0.025  # the mesh's lips are a little apart at rest
# No face is symmetric at rest; its lips are pressed a little, its lids a little down.
REST = {
    "mouthSmileLeft": 0.06,
    "mouthSmileRight": 0.02,
    "browOuterUpLeft": 0.06,
    "eyeSquintRight": 0.06,
    "eyeBlinkLeft": 0.08,
    "eyeBlinkRight": 0.11,
    "mouthPressLeft": 0.10,
    "mouthPressRight": 0.10,
}


def pulse(frame: float, center: float, half_width: float, hold: float = 0.0) -> float:
    """A raised cosine of height 1 around `center`, flat for `hold` frames to either side."""
    distance = max(abs(frame - center) - hold, 0) / half_width
    return 0.5 + 0.5 * np.cos(np.pi * distance) if distance < 1 else 0.0


Wave = list[tuple[float, float, float]]  # height, period, phase
Pulses = list[tuple[float, float, float, float]]  # centre, half width, hold, height


@dataclass(frozen=True)
class Script:
    """What happens in a video: waves and pulses with times in frames, angles in radians."""

    yaw: Wave
    pitch: Wave
    roll: Wave
    gaze: Wave
    jaw: Pulses
    blinks: list[tuple[float, float, float]]  # centre, half width, hold
    events: dict[str, Pulses]  # by the names in MIXTURES


def wave_sum(waves: Wave, frame: float) -> float:
    return sum(height * np.sin(2 * np.pi * frame / period + phase) for height, period, phase in waves)


def pulse_sum(pulses: Pulses, frame: float) -> float:
    return sum(height * pulse(frame, center, width, hold) for center, width, hold, height in pulses)


TRAIN = Script(
    yaw=[(0.56, 64, 0.0), (0.17, 27, 0.9)],
    pitch=[(0.10, 41, 0.6), (0.07, 23, 2.0)],
    roll=[(0.07, 53, 1.1), (0.03, 19, 0.3)],
    gaze=[(0.16, 37, 1.0), (0.08, 17, 0.2)],
    jaw=[
        (12, 7, 1, 0.30),
        (35, 4, 0, 0.14),
        (41, 4, 0, 0.20),
        (47, 4, 0, 0.10),
        (53, 6, 1, 0.36),
        (68, 4, 0, 0.12),
        (74, 5, 0, 0.22),
        (86, 6, 1, 0.32),
    ],
    blinks=[(6, 3, 0.6), (22, 3, 0.4), (38, 3, 1.5), (57, 3, 0.5), (71, 3, 0.4), (81, 4, 1.0), (93, 3, 0.4)],
    events={
        "smile": [(24, 9, 3, 0.75), (63, 8, 2, 0.55), (86, 8, 2, 0.45)],
        "brows_up": [(12, 8, 2, 0.9), (53, 7, 2, 0.8), (77, 6, 0, 0.5)],
        "brows_down": [(34, 8, 3, 0.8), (68, 6, 1, 0.6)],
        "pucker": [(44, 6, 1, 0.8), (79, 5, 0, 0.5)],
        "funnel": [(41, 5, 0, 0.6), (74, 5, 0, 0.6)],
        "frown": [(32, 6, 1, 0.6), (68, 6, 1, 0.4)],
        "sneer": [(34, 5, 0, 0.7)],
        "left": [(49, 5, 0, 0.5)],
        "right": [(82, 5, 0, 0.5)],
        "upper_lip": [(24, 6, 1, 0.4), (86, 6, 0, 0.4)],
        "puff": [(3, 4, 0, 0.6), (91, 4, 0, 0.7)],
        "stretch": [(53, 6, 0, 0.4)],
        "wide": [(12, 6, 1, 0.7), (53, 6, 1, 0.6)],
    },
)
TEST = Script(
    yaw=[(0.52, 22, 2.2), (0.14, 9.5, 0.5)],
    pitch=[(0.09, 15, 1.9), (0.05, 8, 0.2)],
    roll=[(0.06, 19, 2.4)],
    gaze=[(0.14, 14, 2.6)],
    jaw=[(3, 4, 0, 0.16), (9, 4, 1, 0.33), (16, 3, 0, 0.12), (20, 4, 1, 0.28)],
    blinks=[(2, 2.5, 0.4), (11, 2.5, 1.0), (18, 2.5, 0.5)],
    events={
        "smile": [(6, 5, 0, 0.6), (21, 5, 1, 0.5)],
        "brows_up": [(9, 5, 1, 0.8)],
        "brows_down": [(15, 4, 0, 0.7)],
        "pucker": [(15, 3, 0, 0.6)],
        "funnel": [(3, 3, 0, 0.5)],
        "frown": [(14, 4, 0, 0.4)],
        "left": [(17, 3, 0, 0.4)],
        "upper_lip": [(21, 4, 0, 0.4)],
        "wide": [(8, 4, 0, 0.5)],
    },
)
# What an event moves, by expression; "*" stands for Left and Right.
MIXTURES = {
    "smile": {"mouthSmile*": 1.0, "cheekSquint*": 0.6, "eyeSquint*": 0.4, "mouthDimple*": 0.2},
    "brows_up": {"browInnerUp": 0.8, "browOuterUp*": 0.7},
    "brows_down": {"browDown*": 0.9, "eyeSquint*": 0.25},
    "pucker": {"mouthPucker": 0.9},
    "funnel": {"mouthFunnel": 0.9},
    "frown": {"mouthFrown*": 0.9, "mouthShrugLower": 0.4},
    "sneer": {"noseSneer*": 0.9},
    "left": {"mouthLeft": 1.0, "mouthSmileLeft": 0.3},
    "right": {"mouthRight": 1.0, "mouthSmileRight": 0.3},
    "upper_lip": {"mouthUpperUp*": 1.0, "mouthLowerDown*": 0.5},
    "puff": {"cheekPuff": 1.0},
    "stretch": {"mouthStretch*": 0.8},
    "wide": {"eyeWide*": 0.9},
}


def expand(mixture: dict[str, float]) -> dict[str, float]:
    """Write "NAME*" out as NAMELeft, stronger, and NAMERight: nobody smiles evenly."""
    full = {}
    for name, height in mixture.items():
        if name.endswith("*"):
            full[name[:-1] + "Left"], full[name[:-1] + "Right"] = height, 0.9 * height
        else:
            full[name] = height
    return full


def parameters(script: Script, frame: float, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pose (15) in axis-angle and expression (50) of one frame."""
    pose = np.zeros(15)
    pose[3] = wave_sum(script.pitch, frame)
    pose[4] = np.clip(wave_sum(script.yaw, frame), -LARGEST_YAW, LARGEST_YAW)
    pose[5] = wave_sum(script.roll, frame)
    pose[6] = CLOSED_JAW + pulse_sum(script.jaw, frame)
    # The eyes half stay with the camera while the head turns.
    gaze_yaw = np.clip(wave_sum(script.gaze, frame) - 0.35 * pose[4], -0.40, 0.40)
    gaze_pitch = np.clip(-0.4 * pose[3] + 0.3 * wave_sum(script.gaze, 1.7 * frame + 9), -0.2, 0.2)
    pose[[9, 12]], pose[[10, 13]] = gaze_pitch, gaze_yaw

    values = dict(REST)

    def add(name: str, value: float) -> None:
        values[name] = values.get(name, 0.0) + value

    for event, mixture in MIXTURES.items():
        strength = pulse_sum(script.events.get(event, []), frame)
        for name, height in expand(mixture).items():
            add(name, strength * height)
    # An open mouth bares some teeth.
    for side in ("Left", "Right"):
        add(f"mouthUpperUp{side}", 3.0 * max(pose[6], 0))
        add(f"mouthLowerDown{side}", 2.4 * max(pose[6], 0))
    blink = min(max((pulse(frame, *at) for at in script.blinks), default=0.0), 1.0)
    for side in ("Left", "Right"):
        for name in (f"eyeWide{side}", f"eyeSquint{side}"):
            values[name] = values.get(name, 0.0) * (1 - blink)
        add(f"eyeLookDown{side}", 1.5 * max(gaze_pitch, 0) * (1 - blink))
        add(f"eyeLookUp{side}", 1.5 * max(-gaze_pitch, 0) * (1 - blink))
        add(f"eyeBlink{side}", blink)
        values[f"mouthPress{side}"] *= 1 - min(max(pose[6], 0) / 0.1, 1)
    unknown = values.keys() - set(names)
    if unknown:
        raise ValueError(f"the head has no expression {', '.join(sorted(unknown))}")
    return pose, np.array([min(values.get(name, 0.0), 1.0) for name in names])


def frame_parameters(index: int, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pose and expression of frame `index`: first the training frames, then the held-out ones."""
    if index < TRAIN_FRAMES:
        return parameters(TRAIN, index, names)
    return parameters(TEST, index - TRAIN_FRAMES, names)
