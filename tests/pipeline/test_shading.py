"""The dome's shading kernels against the plain formulas in float64."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.dome.appearance import Appearance
from pipeline.dome.scene import DomeConfig, DomeScene, dome_scene
from pipeline.dome.shading import highlights, interpolate

LIGHTS = np.array([[-0.48, 0.48, 0.734], [0.75, 0.15, -0.65], [0.0, 0.98, 0.2]])
STRENGTHS = np.array([1.0, 0.7, 0.5])


@pytest.fixture(scope="module")
def scene() -> DomeScene:
    return dome_scene(DomeConfig(cameras=5, image_size_hw=(16, 12), texture_size=64))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def plain_gloss(position, normal, oil, wet, lights, eye) -> tuple[np.ndarray, np.ndarray]:
    """Blinn-Phong with half vectors that are really built."""
    toward_eye = unit(eye - position)
    facing = (normal * toward_eye).sum(-1)
    lobes = []
    for light in lights:
        half = (normal * unit(toward_eye + light)).sum(-1).clip(0, 1)
        lobes.append(np.where(normal @ light > 0, half**16, 0.0))
    skin, sharp = (np.tensordot(STRENGTHS, np.array(lobes) ** power, axes=1) for power in (1, 4))
    fresnel = 0.75 + 0.25 * (1 - facing.clip(0, 1)) ** 4
    return 255 * (oil * fresnel * (0.7 * skin + 0.5 * sharp) + wet * sharp), facing


def test_highlights_agree_with_the_plain_formula():
    generator = np.random.default_rng(0)
    position, normal = generator.normal(0, 80, (5000, 3)), unit(generator.normal(size=(5000, 3)))
    oil, wet, eye = generator.random(5000), generator.random(5000), np.array([200.0, -100.0, 950.0])
    lights = unit(LIGHTS)
    gloss, facing = np.empty(5000, np.float32), np.empty(5000, np.float32)
    highlights(
        np.ascontiguousarray(position.T.astype(np.float32)),
        np.ascontiguousarray(normal.T.astype(np.float32)),
        oil.astype(np.float32),
        wet.astype(np.float32),
        tuple(
            (*light, strength) for light, strength in zip(lights.astype(np.float32), np.float32(STRENGTHS), strict=True)
        ),
        tuple(eye.astype(np.float32)),
        gloss,
        facing,
    )
    expected_gloss, expected_facing = plain_gloss(position, normal, oil, wet, lights, eye)
    assert expected_gloss.max() > 100
    # Measured: 2.3e-3 grey levels, where the sharp lobe (a 64th power) is steep.
    np.testing.assert_allclose(gloss, expected_gloss, atol=1e-2)
    np.testing.assert_allclose(facing, expected_facing, atol=1e-6)


def test_interpolation_is_a_weighted_sum_of_corners():
    generator = np.random.default_rng(1)
    corners, weights = generator.integers(0, 9, (50, 3)), generator.random((50, 3)).astype(np.float32)
    values, out = generator.normal(size=(9, 3)).astype(np.float32), np.empty((3, 50), np.float32)
    interpolate(corners, weights, values, out)
    np.testing.assert_allclose(out.T, (weights[..., None] * values[corners]).sum(1), atol=1e-6)


def test_average_is_the_mean_of_the_views_weighted_by_how_they_face(scene):
    face, head = scene.face, scene.world_from_head
    rest = np.zeros(len(face.names))
    skin = scene.appearance.light(face.neutral, rest, head)
    centres = np.array([[0.0, 0.0, 1000.0], [700.0, 100.0, 700.0], [-600.0, -200.0, 650.0]])
    views, covered = np.stack([skin.view(centre) for centre in centres]), scene.appearance.covered.numpy()
    position, normal = (part.numpy().T for part in scene.appearance._texels(face.neutral))
    facing = np.stack([(normal * unit(centre - position)).sum(-1) for centre in centres])
    weight = np.maximum((facing - 0.15) / 0.85, 0.01) ** 2
    expected = (weight[..., None] * views[:, covered]).sum(0) / weight.sum(0)[:, None]
    # Measured: 4e-5 grey levels.
    np.testing.assert_allclose(skin.average(centres)[covered], expected, atol=1e-3)


def test_empty_texels_beside_a_chart_repeat_it(scene):
    # The procedural atlas has no empty texel: here it takes the middle of the texture.
    topology = replace(scene.face.topology, uvs=0.25 + 0.5 * scene.face.topology.uvs)
    appearance = Appearance(replace(scene.face, topology=topology), 64, scene.world_from_head[:, :3])
    covered = appearance.covered.numpy()
    skin = appearance.light(scene.face.neutral, np.zeros(len(scene.face.names)), scene.world_from_head)
    atlas = skin.view(np.array([0.0, 0.0, 1000.0]))
    beside = [
        (row, column)
        for row, column in np.argwhere(~covered[1:-1, 1:-1]) + 1
        if covered[row - 1 : row + 2, column].any() or covered[row, column - 1 : column + 2].any()
    ]
    assert len(beside) > 10
    for row, column in beside:
        window = np.s_[row - 1 : row + 2, column - 1 : column + 2]
        assert (atlas[window][covered[window]] == atlas[row, column]).all(axis=-1).any()
