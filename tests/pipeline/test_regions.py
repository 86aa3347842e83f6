"""Regions of the two topologies there are: the procedural head's and, where the asset lies, Multiface's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lipflow.regions import REGIONS, face_regions, pixel_regions, region_means, vertex_regions
from lipflow.render.renderer import Renderer
from lipflow.types import CameraTensors, Topology
from pipeline.dome.face import FaceAsset, procedural_face
from pipeline.dome.realface import load_realface

MOUTH, EYES, REST = range(3)


REALFACE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "realface"
needs_realface = pytest.mark.skipif(not REALFACE.is_dir(), reason="the real face asset (../shared) is not here")


@pytest.fixture(scope="module", params=["procedural", pytest.param("multiface", marks=needs_realface)])
def face(request: pytest.FixtureRequest) -> FaceAsset:
    return procedural_face(64) if request.param == "procedural" else load_realface(REALFACE)


@pytest.fixture(scope="module")
def labels(face: FaceAsset) -> np.ndarray:
    return vertex_regions(face.topology, face.neutral)


def test_labels_partition_the_vertices_and_hold_their_own_landmarks(face, labels):
    assert labels.shape == (face.topology.num_vertices,)
    assert set(labels.tolist()) == {MOUTH, EYES, REST}
    for name, vertex in face.topology.landmarks.items():
        expected = MOUTH if name.startswith("lip_") else EYES if name.startswith("eye_") else REST
        assert labels[vertex] == expected, name


def test_a_symmetric_head_has_symmetric_regions():
    head = procedural_face(64)
    labels = vertex_regions(head.topology, head.neutral)
    mirrored = head.neutral * np.array([-1, 1, 1], np.float32)
    for start in range(0, len(mirrored), 500):
        distance = np.linalg.norm(mirrored[start : start + 500, None] - head.neutral[None], axis=-1)
        # Every vertex has a twin: the head is symmetric, measured to 0.000002 mm.
        assert distance.min(1).max() < 1e-4
        np.testing.assert_array_equal(labels[distance.argmin(1)], labels[start : start + 500])


def test_regions_are_where_mouth_and_eyes_are(face, labels):
    lips, eyes = face.neutral[labels == MOUTH], face.neutral[labels == EYES]
    landmarks = {name: face.neutral[vertex] for name, vertex in face.topology.landmarks.items()}
    reach_mm = 0.16 * np.linalg.norm(landmarks["eye_left_outer"] - landmarks["eye_right_outer"])
    assert lips[:, 1].min() > min(at[1] for name, at in landmarks.items() if name.startswith("lip_")) - reach_mm
    assert lips[:, 1].max() < eyes[:, 1].min()
    assert lips[:, 0].max() > landmarks["lip_corner_left"][0]
    # Brows are their own.
    assert eyes[:, 1].max() < max(at[1] for name, at in landmarks.items() if name.startswith("brow_"))
    # The face, not the back of the head.
    assert min(lips[:, 2].min(), eyes[:, 2].min()) > 0


def test_regions_do_not_depend_on_size(face, labels):
    np.testing.assert_array_equal(vertex_regions(face.topology, 1.3 * face.neutral + 5), labels)


def test_a_topology_without_eye_corners_is_all_rest(face):
    bare = Topology(**{**vars(face.topology), "landmarks": {"lip_upper": 5}})
    assert set(vertex_regions(bare, face.neutral).tolist()) == {REST}


def test_a_triangle_takes_the_region_of_two_of_its_vertices():
    topology = Topology(
        faces=np.array([[0, 1, 2], [0, 2, 3], [1, 3, 4], [0, 1, 3]]),
        uvs=np.zeros((5, 2), np.float32),
        uv_faces=np.zeros((4, 3), np.int64),
        weight_mask=np.ones((1, 1), np.float32),
        landmarks={},
        num_vertices=5,
    )
    labels = np.array([MOUTH, MOUTH, REST, EYES, EYES])
    # 0 0 2; 0 2 1: all differ; 0 1 1; 0 0 1
    np.testing.assert_array_equal(face_regions(topology, labels), [MOUTH, REST, EYES, MOUTH])


def test_region_means_by_hand():
    values = torch.tensor([[1.0, 3.0], [10.0, 99.0]])
    labels = torch.tensor([[MOUTH, MOUTH], [REST, -1]])
    assert region_means(values, labels)[[MOUTH, REST]].tolist() == [2.0, 10.0]
    assert region_means(values, labels)[EYES].isnan()


def test_pixel_regions_partition_what_the_mesh_covers(face, labels):
    intrinsics = torch.tensor([[300.0, 0, 48], [0, 300.0, 64], [0, 0, 1]])[None, None]
    pose = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 700.0]])[None, None]
    renderer = Renderer(face.topology)
    out = renderer.render(
        torch.from_numpy(face.neutral)[None], torch.zeros(1, 1, 1, 2, 2), CameraTensors(intrinsics, pose), (128, 96)
    )
    regions = pixel_regions(out.triangle_id, torch.from_numpy(face_regions(face.topology, labels)))
    assert torch.equal(regions >= 0, out.mask)
    counts = torch.bincount(regions[out.mask], minlength=len(REGIONS))
    assert counts.min() > 50
    # A frontal view shows most of the rest, and eyes above the mouth.
    assert counts[REST] > counts[MOUTH] + counts[EYES]
    rows = torch.arange(128.0)[:, None].expand(128, 96)
    assert rows[regions[0, 0] == EYES].max() < rows[regions[0, 0] == MOUTH].min()
