"""Goliath's captures: recognised, and not read, because its public documents do not suffice.

What they do state (``DATASHEET.md`` and ``ca_code/utils/dataloader.py`` of
https://github.com/facebookresearch/goliath) is close to Ava-256: AVIF in zips, PLY meshes, the same calibration file.
What they do not state: the columns of ``frame_segments_list.csv``, without which no frame has a segment, and the fields
of the keypoints' JSON. The topology and its texture coordinates are in none of a capture's files: the loader takes
them from a pickled ``.pt`` of shared assets, which is given out with the gated data; nothing here is ever unpickled.
"""

from __future__ import annotations

from lipflow.errors import CaptureError
from pipeline import storage

_FRAME_LISTS = ("frame_splits_list.csv", "frame_segments_list.csv")


def is_goliath(uri: str) -> bool:
    """Whether the folder is a capture of Goliath: its frame lists have names of their own."""
    return any(storage.exists(storage.join(uri, name)) for name in _FRAME_LISTS)


def refuse_goliath(uri: str) -> None:
    """Raise if the folder is a capture of Goliath.

    Raises:
        CaptureError: it is, with what is missing and what to do.
    """
    if is_goliath(uri):
        raise CaptureError(
            f"{storage.normalize_uri(uri)}: a capture of Goliath, which is not read: its public documents state "
            "neither the columns of frame_segments_list.csv nor the keypoints' JSON, and its topology comes in a "
            "gated, pickled .pt file; to use a head capture, write it in the Ava-256 layout: decoder/ with "
            "frame_list.csv (seg_id,frame_id), the zips (textures as AVIF), and the topology as face_topology.obj"
        )
