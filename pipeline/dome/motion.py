"""What the subject does: expression segments, sentence-like mixtures, and small head movements.

Every segment's motion depends on the seed and the segment's own name alone. Expression segments (``EXP_``) run
through a few shapes; sentences (``SEN_``) mix all shapes at random, so that a held-out sentence is a new mixture of
shapes that were seen before.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

_MAX_DISPLACEMENT_MM = 27.0
_EXPRESSIONS: tuple[tuple[str, tuple[dict[str, float], ...]], ...] = (
    ("EXP_jaw_open", ({"jawOpen": 1.0}, {"jawOpen": 0.5, "mouthStretch": 0.5}, {"jawLeft": 0.8, "jawOpen": 0.3})),
    ("EXP_smile", ({"mouthSmile": 1.0, "cheekSquint": 0.6}, {"mouthSmile": 0.8, "jawOpen": 0.4, "eyeSquint": 0.6})),
    ("EXP_eyes", ({"eyeBlink": 1.0}, {"eyeWide": 1.0, "browInnerUp": 0.5}, {"eyeSquint": 1.0, "cheekSquint": 0.7})),
    (
        "EXP_pucker",
        ({"mouthPucker": 1.0}, {"mouthFunnel": 1.0, "jawOpen": 0.3}, {"mouthPucker": 0.7, "jawRight": 0.5}),
    ),
    ("EXP_cheeks", ({"cheekPuff": 1.0}, {"cheekPuffLeft": 1.0, "mouthPucker": 0.3}, {"cheekPuffRight": 1.0})),
    ("EXP_brows", ({"browInnerUp": 1.0, "browOuterUp": 1.0}, {"browDown": 1.0}, {"browOuterUpLeft": 1.0})),
    ("EXP_frown", ({"mouthFrown": 1.0, "browDown": 0.7}, {"mouthFrown": 0.6, "mouthStretch": 0.5})),
    ("EXP_sneer", ({"noseSneer": 1.0, "mouthUpperUp": 0.7}, {"noseSneerRight": 1.0, "eyeSquintRight": 0.6})),
    ("EXP_lips", ({"mouthUpperUp": 1.0}, {"mouthLowerDown": 1.0}, {"mouthUpperUp": 0.7, "mouthLowerDown": 0.7})),
    (
        "EXP_one_sided",
        ({"mouthSmileLeft": 1.0, "eyeBlinkLeft": 0.9}, {"mouthSmileRight": 1.0, "browOuterUpRight": 0.8}),
    ),
    (
        "EXP_surprise",
        ({"jawOpen": 0.7, "eyeWide": 1.0, "browInnerUp": 1.0, "browOuterUp": 1.0}, {"mouthFunnel": 0.8}),
    ),
    (
        "EXP_disgust",
        ({"noseSneer": 0.9, "browDown": 0.8, "mouthFrown": 0.6}, {"mouthStretch": 1.0, "eyeSquint": 0.5}),
    ),
)
_SENTENCES = (
    *("SEN_a_good_morrow", "SEN_bright_blue_sails", "SEN_could_you_open_it", "SEN_do_boats_float"),
    *("SEN_every_warm_loaf", "SEN_four_shy_foxes", "SEN_grey_wool_shawl", "SEN_how_far_is_rome"),
)
# Shapes of speech with their usual strength, and of what the upper face does meanwhile.
_SPEECH = {
    **{"jawOpen": 0.75, "mouthFunnel": 0.7, "mouthPucker": 0.8, "mouthSmile": 0.6, "mouthStretch": 0.6},
    **{"mouthUpperUp": 0.5, "mouthLowerDown": 0.7, "mouthFrown": 0.4, "jawLeft": 0.3, "jawRight": 0.3},
}
_UPPER_FACE = {
    **{"browInnerUp": 0.8, "browOuterUp": 0.8, "browDown": 0.8, "eyeSquint": 0.5, "eyeWide": 0.6},
    **{"cheekSquint": 0.6, "noseSneer": 0.5, "cheekPuff": 0.6},
}
_EXPRESSION_SHARE = 0.6
_FRAMES_PER_SYLLABLE = 5.0


def segment_names(count: int) -> tuple[str, ...]:
    """``count`` segments: about three expressions for two sentences, numbered where the vocabulary runs out."""
    expressions = max(1, round(count * _EXPRESSION_SHARE))
    names = [name for name, _ in _EXPRESSIONS]
    return (*_repeated(names, expressions), *_repeated(_SENTENCES, count - expressions))


def segment_weights(segment: str, frames: int, shape_names: Sequence[str], deltas: np.ndarray, seed: int) -> np.ndarray:
    """Shape weights of every frame of a segment.

    Args:
        segment: one of :func:`segment_names`.
        frames: F, how many frames.
        shape_names: the face's E shapes.
        deltas: ``(E, V, 3)`` mm; shapes that move a vertex further than a mouth opens are scaled down.
        seed: of the dome.

    Returns:
        ``(F, E)`` float64 in 0..1.
    """
    generator = segment_generator(seed, segment)
    weights = np.zeros((frames, len(shape_names)))
    recipe = dict(_EXPRESSIONS).get(segment.rsplit(".", 1)[0])
    if recipe is not None:
        time = (np.arange(frames) + 0.5) / frames * len(recipe)
        for position, pose in enumerate(recipe):
            rise = np.clip(1.0 - np.abs(time - position - 0.5) / 0.75, 0.0, 1.0)
            envelope = np.sin(rise * np.pi / 2) ** 2 * generator.uniform(0.85, 1.0)
            for name, strength in pose.items():
                for index in _columns(name, shape_names):
                    weights[:, index] = np.maximum(weights[:, index], strength * envelope)
        idle = ("browInnerUp", "mouthSmile", "eyeSquint", "jawOpen")
        for name in idle:
            drift = 0.15 * _bursts(frames, generator, 8.0)
            for index in _columns(name, shape_names):
                weights[:, index] = np.maximum(weights[:, index], drift)
    else:
        for vocabulary, pace in ((_SPEECH, _FRAMES_PER_SYLLABLE), (_UPPER_FACE, 2.5 * _FRAMES_PER_SYLLABLE)):
            for name, strength in vocabulary.items():
                shared = _bursts(frames, generator, pace)
                for index in _columns(name, shape_names):
                    own = _bursts(frames, generator, pace)
                    weights[:, index] = strength * (0.8 * shared + 0.2 * own)
    blink = _blinks(frames, generator)
    for index in _columns("eyeBlink", shape_names):
        weights[:, index] = np.maximum(weights[:, index], blink)
    furthest = np.linalg.norm(deltas, axis=-1).max(axis=1)
    return np.clip(weights, 0.0, 1.0) * np.minimum(1.0, _MAX_DISPLACEMENT_MM / np.maximum(furthest, 1e-6))


def head_motion(
    segment: str, frames: int, world_from_head: np.ndarray, rotation_deg: float, translation_mm: float, seed: int
) -> np.ndarray:
    """Head poses ``(F, 3, 4)`` of a segment: smooth turns and shifts about the mean pose ``world_from_head``.

    Args:
        segment: the segment's name.
        frames: F.
        world_from_head: ``(3, 4)`` mean pose.
        rotation_deg: amplitude of the turn about each axis.
        translation_mm: amplitude of the shift along each axis.
        seed: of the dome.
    """
    generator = segment_generator(seed, segment + "/head")
    time = np.arange(frames)[:, None]
    period = generator.uniform(14.0, 30.0, 6)
    wave = np.sin(2 * np.pi * (time / period + generator.random(6))) * generator.uniform(0.4, 1.0, 6)
    poses = np.empty((frames, 3, 4))
    for index in range(frames):
        turn = _rotation(np.radians(rotation_deg) * wave[index, :3])
        poses[index, :, :3] = world_from_head[:, :3] @ turn
        poses[index, :, 3] = world_from_head[:, 3] + translation_mm * wave[index, 3:]
    return poses


def segment_generator(seed: int, segment: str, *stream: int) -> np.random.Generator:
    """Random numbers that depend on the seed, the segment's name and ``stream`` alone."""
    return np.random.default_rng([seed, zlib.crc32(segment.encode()), *stream])


def _repeated(names: Sequence[str], count: int) -> list[str]:
    return [names[i % len(names)] + (f".{i // len(names) + 1}" if i >= len(names) else "") for i in range(count)]


def _columns(name: str, shape_names: Sequence[str]) -> list[int]:
    """Where a shape is; both sides of it if the face only has it by side; nowhere if the face lacks it."""
    wanted = (name,) if name in shape_names else (f"{name}Left", f"{name}Right")
    return [shape_names.index(shape) for shape in wanted if shape in shape_names]


def _bursts(frames: int, generator: np.random.Generator, pace: float) -> np.ndarray:
    """A smooth random function ``(F,)`` in 0..1 that rests at 0 about half of the time."""
    knots = np.clip(generator.uniform(-0.9, 1.0, int(frames / pace) + 4), 0.0, None)
    position = np.arange(frames) / pace + generator.random()
    cell = position.astype(int)
    t = position - cell
    blend = t * t * (3.0 - 2.0 * t)
    return knots[cell] * (1 - blend) + knots[cell + 1] * blend


def _blinks(frames: int, generator: np.random.Generator) -> np.ndarray:
    start = generator.uniform(0.0, 12.0) + np.cumsum(generator.uniform(12.0, 26.0, frames // 12 + 2))
    distance = np.abs(np.arange(frames)[:, None] - start[None]).min(axis=1)
    return np.clip(1.4 - 0.6 * distance, 0.0, 1.0)


def _rotation(vector: np.ndarray) -> np.ndarray:
    """The rotation about ``vector`` by its length, radians (Rodrigues)."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
