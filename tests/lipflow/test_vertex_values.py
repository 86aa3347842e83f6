"""Values on vertices seen through pixels, against a map that the renderer makes itself: depth."""

import dataclasses

import numpy as np
import torch

from lipflow.render.camera import transform_points
from lipflow.render.renderer import Renderer
from lipflow.render.vertex_values import vertex_values_seen
from tests.lipflow.render_scenes import QUAD_FACES, bump, camera_at_origin, cameras_around, make_topology, tilted_quad

SIZE = (40, 48)
BLANK = torch.zeros(1, 1, 1, 4, 4)


def test_the_vertices_depths_give_the_depth_map():
    topology, vertices = bump()
    cameras = cameras_around([-0.6, 0.4], SIZE)
    renderer = Renderer(topology)
    rendered = renderer.render(vertices[None], BLANK.double(), cameras, SIZE)
    for view in range(2):
        depths = transform_points(vertices, cameras.cam_from_head[0, view])[:, 2]
        found = vertex_values_seen(renderer, rendered, depths[None])[0, view]
        assert rendered.mask[0, view].sum() > 300
        # float32 texture coordinates of triangles 1/9 wide; measured: 4e-4 mm of 600
        torch.testing.assert_close(found, rendered.depth[0, view].to(found.dtype), atol=5e-3, rtol=0)


def test_each_frame_has_values_of_its_own_and_nothing_is_seen_outside():
    topology, vertices = bump()
    cameras = cameras_around([0.0], SIZE)
    pair = dataclasses.replace(
        cameras,
        intrinsics=cameras.intrinsics.repeat(2, 1, 1, 1),
        cam_from_head=cameras.cam_from_head.repeat(2, 1, 1, 1),
    )
    renderer = Renderer(topology)
    rendered = renderer.render(vertices.repeat(2, 1, 1), BLANK.double().repeat(2, 1, 1, 1, 1), pair, SIZE)
    values = torch.stack([torch.full((len(vertices),), 3.0), torch.arange(len(vertices)) * 1.0])
    seen = vertex_values_seen(renderer, rendered, values)
    mask = rendered.mask[0, 0]
    # measured: 0
    torch.testing.assert_close(seen[0, 0][mask], torch.full((int(mask.sum()),), 3.0), atol=1e-5, rtol=0)
    assert seen[1, 0][mask].min() >= -1e-3
    assert seen[1, 0][mask].max() <= len(vertices) - 1 + 1e-3
    assert not seen[:, 0, ~mask].any()


def test_triangles_without_area_in_texture_space_take_the_mean_of_their_corners():
    topology = make_topology(QUAD_FACES, np.full((4, 2), 0.5))
    renderer, camera = Renderer(topology), camera_at_origin()
    rendered = renderer.render(tilted_quad()[None], BLANK, camera, (32, 40))
    found = vertex_values_seen(renderer, rendered, torch.tensor([[0.0, 3.0, 6.0, 9.0]]))
    assert set(found[rendered.triangle_id == 0].tolist()) == {3.0}
    assert set(found[rendered.triangle_id == 1].tolist()) == {5.0}
