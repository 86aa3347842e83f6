"""The procedural head and the real face asset: shape, expressions, landmarks, texture."""

from pathlib import Path

import numpy as np
import pytest

from lipflow.errors import CaptureError
from lipflow.render.camera import compose
from lipflow.render.unwrap import Unwrapper
from pipeline.captures.krt import parse_krt
from pipeline.dome.face import FaceAsset, procedural_face
from pipeline.dome.realface import load_realface
from pipeline.driving.landmarks import LANDMARK_NAMES

REALFACE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "realface"
needs_realface = pytest.mark.skipif(not REALFACE.is_dir(), reason="the real face asset (../shared) is not here")


@pytest.fixture(scope="module")
def head() -> FaceAsset:
    return procedural_face(texture_size=64)


@pytest.fixture(scope="module")
def real() -> FaceAsset:
    return load_realface(REALFACE)


def volume_cm3(face: FaceAsset, vertices: np.ndarray) -> float:
    a, b, c = (vertices[face.topology.faces[:, corner]].astype(np.float64) for corner in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6e3)


def pose(face: FaceAsset, **weights: float) -> np.ndarray:
    return face.posed(np.array([weights.get(name, 0.0) for name in face.names]))


def spot(face: FaceAsset, vertices: np.ndarray, name: str) -> np.ndarray:
    return vertices[face.topology.landmarks[name]]


def rounded(vertices: np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(vertex) for vertex in (np.round(vertices, 1) + 0.0).tolist()]


def test_procedural_head_has_the_size_of_a_head(head):
    low, high = head.neutral.min(axis=0), head.neutral.max(axis=0)
    np.testing.assert_allclose(low, [-93, -205, -150], atol=6)
    np.testing.assert_allclose(high, [93, 150, 74], atol=6)
    assert 2000 <= len(head.neutral) <= 4200
    assert 3500 < volume_cm3(head, head.neutral) < 6500


def test_procedural_head_is_finite_and_faces_look_outward(head):
    for array in (head.neutral, head.deltas, head.topology.uvs):
        assert np.isfinite(array).all()
    assert volume_cm3(head, head.neutral) > 0
    # The skin of the face itself: normals of faces in front point to +z, away from webs and underside of nose.
    triangles = head.neutral[head.topology.faces]
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    cheek = np.abs(triangles.mean(axis=1) - [40, -20, 45]).max(axis=1) < 12
    assert cheek.sum() > 20
    assert (normal[cheek, 2] > 0).all()


def test_only_the_neck_is_open(head):
    edges = np.sort(head.topology.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    unique, count = np.unique(edges, axis=0, return_counts=True)
    assert count.max() == 2
    border = unique[count == 1]
    assert len(border) == len(np.unique(border))
    assert head.neutral[border.ravel(), 1].max() < -200


def test_atlas_has_no_flipped_or_overlapping_triangles(head):
    corners = head.topology.uvs[head.topology.uv_faces].astype(np.float64)
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = 0.5 * (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0])
    assert (area > 0).all()
    assert corners.min() >= 0
    assert corners.max() <= 1
    covered = Unwrapper(head.topology, 256).covered.float().mean().item()
    assert area.sum() == pytest.approx(covered, abs=2e-3)


def test_expressions_have_arkit_names_and_both_sides(head):
    assert len(head.names) >= 12
    assert {"jawOpen", "mouthPucker", "browInnerUp", "jawLeft"} <= set(head.names)
    for name in ("mouthSmile", "eyeBlink", "cheekPuff", "browDown", "mouthStretch", "noseSneer", "eyeSquint"):
        assert {f"{name}Left", f"{name}Right"} <= set(head.names)
    moved = np.linalg.norm(head.deltas, axis=-1).max(axis=1)
    assert (moved > 1.0).all()


def test_left_and_right_shapes_are_mirror_images(head):
    places = {place: index for index, place in enumerate(rounded(head.neutral))}
    partner = np.array([places[place] for place in rounded(head.neutral * np.float32([-1, 1, 1]))])
    # Behind the lips, several vertices of a web may lie at one place: leave them out.
    skin = np.setdiff1d(np.arange(len(partner)), head.topology.faces[np.concatenate(list(head.webs.values()))])
    for name in ("mouthSmile", "eyeBlink", "cheekPuff"):
        left = head.deltas[head.names.index(f"{name}Left")]
        right = head.deltas[head.names.index(f"{name}Right")]
        np.testing.assert_allclose(left[skin] * [-1, 1, 1], right[partner[skin]], atol=1e-3)


def test_shapes_leave_the_back_of_the_head_and_the_neck_alone(head):
    still = (head.neutral[:, 2] < -60) | (head.neutral[:, 1] < -180) | (head.neutral[:, 1] > 110)
    assert np.linalg.norm(head.deltas[:, still], axis=-1).max() < 1e-3


@pytest.mark.parametrize("side", ["Left", "Right"])
def test_blink_closes_the_eye(head, side):
    upper, lower = f"eye_{side.lower()}_upper", f"eye_{side.lower()}_lower"
    opened = spot(head, head.neutral, upper) - spot(head, head.neutral, lower)
    closed = pose(head, **{f"eyeBlink{side}": 1.0})
    assert opened[1] > 8.0
    assert np.abs(spot(head, closed, upper) - spot(head, closed, lower)).max() < 1.0
    other = "right" if side == "Left" else "left"
    np.testing.assert_array_equal(
        spot(head, closed, f"eye_{other}_upper"), spot(head, head.neutral, f"eye_{other}_upper")
    )


def test_jaw_open_parts_the_lips_and_lowers_the_chin(head):
    opened = pose(head, jawOpen=1.0)
    gap = spot(head, opened, "lip_upper") - spot(head, opened, "lip_lower")
    closed_gap = spot(head, head.neutral, "lip_upper") - spot(head, head.neutral, "lip_lower")
    assert gap[1] - closed_gap[1] > 15
    assert spot(head, opened, "chin")[1] < spot(head, head.neutral, "chin")[1] - 15
    assert np.linalg.norm(spot(head, opened, "nose_tip") - spot(head, head.neutral, "nose_tip")) < 0.5


def test_smile_widens_and_raises_the_mouth_and_pucker_narrows_it(head):
    def width(vertices: np.ndarray) -> float:
        return float(spot(head, vertices, "lip_corner_left")[0] - spot(head, vertices, "lip_corner_right")[0])

    smiling = pose(head, mouthSmileLeft=1.0, mouthSmileRight=1.0)
    assert width(smiling) > width(head.neutral) + 10
    assert spot(head, smiling, "lip_corner_left")[1] > spot(head, head.neutral, "lip_corner_left")[1] + 5
    puckered = pose(head, mouthPucker=1.0)
    assert width(puckered) < width(head.neutral) - 12
    assert spot(head, puckered, "lip_upper")[2] > spot(head, head.neutral, "lip_upper")[2] + 5


def test_texture_depends_on_the_seed_and_the_shape_does_not():
    first, again, other = (procedural_face(32, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.texture, again.texture)
    assert (first.texture != other.texture).mean() > 0.3
    np.testing.assert_array_equal(first.neutral, other.neutral)


def test_weight_mask_prefers_eyes_and_mouth(head):
    covered = Unwrapper(head.topology, 64).covered.numpy()
    mask = head.topology.weight_mask
    assert mask.shape == (64, 64)
    assert mask[covered].min() > 0
    assert np.median(mask[covered]) == pytest.approx(1.0, abs=0.3)
    assert 3.5 < mask.max() < 5.1


@needs_realface
def test_real_face_loads_with_its_conventions(real):
    assert len(real.names) == 53
    assert real.neutral.shape == (7306, 3)
    assert real.topology.faces.shape == (11432, 3)
    assert volume_cm3(real, real.neutral) > 3000
    mask = real.topology.weight_mask
    assert mask.max() == pytest.approx(254 / 64)
    assert mask.min() == pytest.approx(0.25)
    # Memory row 0 is v = 0: the neck is bright and lies in the low rows, the dark scalp's sides high up.
    assert real.texture[10:60, 300:700].mean() > 40


@needs_realface
def test_both_faces_have_the_same_landmarks_at_the_same_places(head, real):
    assert tuple(head.topology.landmarks) == tuple(real.topology.landmarks) == LANDMARK_NAMES
    for face in (head, real):
        places = {name: spot(face, face.neutral, name) for name in LANDMARK_NAMES}
        for name, place in places.items():
            assert place[2] > 10, name
            if "left" in name:
                assert place[0] > 5, name
            if "right" in name:
                assert place[0] < -5, name
        heights = [places[name][1] for name in ("brow_left_middle", "eye_left_upper", "nose_tip", "lip_upper", "chin")]
        assert heights == sorted(heights, reverse=True)
        assert 50 < places["eye_left_outer"][0] - places["eye_right_inner"][0] < 75
    used = np.unique(real.topology.faces)
    assert set(real.topology.landmarks.values()) <= set(used.tolist())


@needs_realface
def test_calibration_and_head_pose_of_the_real_rig_reproduce_the_matches():
    cameras = {c.camera_id: c for c in parse_krt((REALFACE / "KRT").read_text(), (2048, 1334), "KRT")}
    assert len(cameras) == 38
    with np.load(REALFACE / "photo_pose.npz") as stored:
        camera = cameras[str(stored["camera_id"])]
        cam_from_head = compose(camera.cam_from_world, stored["world_from_head"])
        points = stored["match_xyz_head"].astype(np.float64) @ cam_from_head[:, :3].T + cam_from_head[:, 3]
        homogeneous = points @ camera.intrinsics.T
        # The matches count integer pixel centres; ours lie at +0.5.
        error = homogeneous[:, :2] / homogeneous[:, 2:] - (stored["match_px"] + 0.5)
    rms = np.sqrt((error**2).sum(axis=1).mean())
    assert rms < 1.0  # 0.69 px over all matches, as the asset states
    assert np.abs(error.mean(axis=0)).max() < 0.1  # half a pixel would show here


def test_folder_without_asset_is_refused(tmp_path):
    with pytest.raises(CaptureError, match=r"not a face asset: topology\.npz"):
        load_realface(tmp_path)
