"""An avatar is used with shard sets of its own capture alone, as far as what is asked of them goes."""

import dataclasses

import pytest

from lipflow.errors import ConfigError


def test_a_capture_is_the_same_as_itself(context):
    context.require_same_capture(context, context.offered_signals)


@pytest.mark.parametrize(
    ("changes", "signal", "others", "message"),
    [
        (
            {"headset_cameras": ()},
            "hmc",
            ("frontal", "keypoints"),
            r"hmc: .* headset cameras \['left-mouth', 'right-mouth'\], .* has \[\]",
        ),
        ({"frontal_camera_id": "cam-c"}, "frontal", ("hmc",), "frontal: .* frontal camera cam-b, .* has cam-c"),
        ({"frontal_camera_id": "cam-c"}, "keypoints", ("hmc",), "keypoints: .* frontal camera cam-b, .* has cam-c"),
        (
            {"keypoint_names": ("nose",)},
            "keypoints",
            ("hmc", "frontal"),
            r"keypoints: .* has \['nose'\]: .*, or use another signal",
        ),
    ],
)
def test_only_signals_that_are_used_must_be_shown_in_the_same_way(context, changes, signal, others, message):
    found = dataclasses.replace(context, **changes)
    context.require_same_capture(found, others)
    with pytest.raises(ConfigError, match=message):
        context.require_same_capture(found, (*others, signal))


def test_other_dome_cameras_are_refused_where_they_are_looked_through(context):
    other = dataclasses.replace(context, camera_ids=context.camera_ids[::-1])
    context.require_same_capture(other, context.offered_signals, cameras=False)
    with pytest.raises(ConfigError, match="made for 4 cameras, the shard set has 4, or other cameras"):
        context.require_same_capture(other)


def test_another_mesh_is_refused(context):
    topology = dataclasses.replace(context.topology, faces=context.topology.faces[:, ::-1])
    with pytest.raises(ConfigError, match=r"81 vertices.*or other faces: give a shard set of the same capture"):
        context.require_same_capture(dataclasses.replace(context, topology=topology), cameras=False)
