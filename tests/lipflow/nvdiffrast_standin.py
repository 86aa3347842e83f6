"""A stand-in for ``nvdiffrast.torch`` on the CPU: its signatures, tensor layouts and checks, slow and readable.

Written from nvdiffrast's documentation and its paper (Laine et al. 2020), so that the code which calls it can be run
without a GPU. It draws both sides of triangles, as the original does. Coverage is exact unless ``subpixel_bits`` of
the context is set: the original rounds projected corners to 4 bits.

What it does not offer, because nothing here calls it, is refused: texture borders other than ``clamp``, cube maps,
custom mip stacks and biases, OpenGL contexts, depth peeling.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


class RasterizeCudaContext:
    def __init__(self, device=None):
        self.device = torch.device("cpu" if device is None else device)
        self.subpixel_bits: int | None = None


class TopologyHash:
    """Which vertices lie opposite of an edge ``(smaller index, larger index)``."""

    def __init__(self, tri: Tensor):
        self.opposite: dict[tuple[int, int], list[int]] = {}
        for face in tri.tolist():
            for corner in range(3):
                edge = sorted((face[corner - 2], face[corner - 1]))
                self.opposite.setdefault((edge[0], edge[1]), []).append(face[corner])

    def across(self, first: int, second: int, own: int) -> int:
        """The vertex on the other side of an edge; -1 at a border."""
        others = [vertex for vertex in self.opposite[min(first, second), max(first, second)] if vertex != own]
        return others[0] if others else -1


def _check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    assert isinstance(tensor, Tensor), name
    assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, expected {dtype}"
    assert tensor.is_contiguous(), f"{name} is not contiguous"
    fits = len(tensor.shape) == len(shape) and all(
        found > 0 and wanted in (None, found) for found, wanted in zip(tensor.shape, shape, strict=False)
    )
    assert fits, f"{name} has shape {tuple(tensor.shape)}, expected {shape}"


def rasterize(glctx, pos, tri, resolution, ranges=None, grad_db=True):
    assert isinstance(glctx, RasterizeCudaContext)
    assert grad_db is True or grad_db is False
    height, width = tuple(resolution)
    _check(tri, "tri", torch.int32, (None, 3))
    if pos.dim() == 3:
        _check(pos, "pos", torch.float32, (None, None, 4))
        views = [(pos[view], tri, 0) for view in range(len(pos))]
    else:
        _check(pos, "pos", torch.float32, (None, 4))
        _check(ranges, "ranges", torch.int32, (None, 2))
        assert ranges.device.type == "cpu"
        views = [(pos, tri[start : start + count], start) for start, count in ranges.tolist()]
    drawn = [_rasterize_view(glctx, *view, height, width) for view in views]
    rast, rast_db = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
    return rast, rast_db if grad_db else rast_db.detach()


def _rasterize_view(glctx, pos, tri, first, height, width):
    corners = pos.detach().double().numpy()[tri.numpy()]
    rounding = 2.0**glctx.subpixel_bits if glctx.subpixel_bits is not None else 0.0
    ids = torch.from_numpy(_visible(corners, height, width, rounding))
    row, column = torch.nonzero(ids >= 0, as_tuple=True)
    face = ids[row, column]
    # Homogeneous coordinates (x, y, w): corner i's weight is det[f, p_j, p_k] over their sum, with the pixel's
    # f = (x, y, 1), hence linear in the pixel before the division.
    seen = pos[tri[face].long()].double()
    p0, p1, p2 = seen[..., [0, 1, 3]].unbind(1)
    planes = torch.stack([torch.linalg.cross(b, c) for b, c in ((p1, p2), (p2, p0), (p0, p1))], 1)
    pixel = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1, torch.ones_like(row)], -1)
    areas = (planes * pixel[:, None].double()).sum(-1)
    total = areas.sum(1, keepdim=True)
    weights = areas / total
    by_pixel = torch.tensor([2 / width, 2 / height], dtype=torch.float64)
    slopes = (planes[..., :2] - weights[..., None] * planes.sum(1, keepdim=True)[..., :2]) / total[..., None] * by_pixel
    # The original gives no gradient to depth, and clamps the weights that it returns.
    depth = ((weights * seen[..., 2]).sum(1) / (weights * seen[..., 3]).sum(1)).detach().clamp(-1, 1)
    clamped = weights[:, :2] + (weights[:, :2].clamp(0, 1) - weights[:, :2]).detach()
    pixels = torch.cat([clamped, depth[:, None], (face + first + 1)[:, None].double()], 1)
    blank = pos.new_zeros(height, width, 4)
    place = (row, column)
    return blank.index_put(place, pixels.float()), blank.index_put(place, slopes[:, :2].flatten(1).float())


@numba.njit(cache=True)
def _visible(corners, height, width, rounding):
    """Index ``(H, W)`` of the nearest of the triangles ``(F, 3, 4)``, -1 for none; the depth is z/w in [-1, 1]."""
    ids = np.full((height, width), -1, np.int64)
    nearest = np.full((height, width), np.inf)
    for face in range(len(corners)):
        p = corners[face].copy()
        if not np.isfinite(p).all():
            continue
        outside = False
        for axis in range(3):
            outside |= (p[:, axis] > p[:, 3]).all() or (p[:, axis] < -p[:, 3]).all()
        if outside:
            continue
        first_x, last_x, first_y, last_y = 0, width, 0, height
        if (p[:, 3] > 0).all():
            if rounding:
                for corner in range(3):
                    w = p[corner, 3]
                    half_x, half_y = width / 2 * rounding, height / 2 * rounding
                    p[corner, 0] = np.round(p[corner, 0] / w * half_x) / half_x * w
                    p[corner, 1] = np.round(p[corner, 1] / w * half_y) / half_y * w
            x, y = (p[:, 0] / p[:, 3] + 1) * width / 2, (p[:, 1] / p[:, 3] + 1) * height / 2
            first_x, last_x = max(int(np.floor(x.min() - 1)), 0), min(int(np.ceil(x.max() + 1)), width)
            first_y, last_y = max(int(np.floor(y.min() - 1)), 0), min(int(np.ceil(y.max() + 1)), height)
        for row in range(first_y, last_y):
            fy = (2 * row + 1) / height - 1
            for column in range(first_x, last_x):
                fx = (2 * column + 1) / width - 1
                x, y = p[:, 0] - fx * p[:, 3], p[:, 1] - fy * p[:, 3]
                a = x[1] * y[2] - x[2] * y[1]
                b = x[2] * y[0] - x[0] * y[2]
                c = x[0] * y[1] - x[1] * y[0]
                total = a + b + c
                if total == 0 or not ((a >= 0 and b >= 0 and c >= 0) or (a <= 0 and b <= 0 and c <= 0)):
                    continue
                w = (a * p[0, 3] + b * p[1, 3] + c * p[2, 3]) / total
                z = (a * p[0, 2] + b * p[1, 2] + c * p[2, 2]) / total
                if w > 0 and -w <= z <= w and z / w < nearest[row, column]:
                    nearest[row, column] = z / w
                    ids[row, column] = face
    return ids


def interpolate(attr, rast, tri, rast_db=None, diff_attrs=None):
    _check(rast, "rast", torch.float32, (None, None, None, 4))
    _check(tri, "tri", torch.int32, (None, 3))
    _check(attr, "attr", torch.float32, (None,) * attr.dim())
    attr = attr[None] if attr.dim() == 2 else attr
    assert attr.dim() == 3
    assert len(attr) in (1, len(rast)), "minibatch size mismatch between rast and attr"
    attr = attr.expand(len(rast), -1, -1)
    view, row, column = torch.nonzero(rast[..., 3] > 0, as_tuple=True)
    pixel = rast[view, row, column]
    corners = attr[view[:, None], tri[pixel[:, 3].long() - 1].long()]
    weights = torch.stack([pixel[:, 0], pixel[:, 1], 1 - pixel[:, 0] - pixel[:, 1]], 1)
    place = (view, row, column)
    values = attr.new_zeros(*rast.shape[:3], attr.shape[-1]).index_put(place, (weights[..., None] * corners).sum(1))
    if diff_attrs is None:
        return values, attr.new_zeros(*rast.shape[:3], 0)
    _check(rast_db, "rast_db", torch.float32, tuple(rast.shape))
    chosen = list(range(attr.shape[-1])) if isinstance(diff_attrs, str) and diff_attrs == "all" else list(diff_attrs)
    slopes = rast_db[view, row, column].unflatten(-1, (2, 2))
    slopes = torch.cat([slopes, -slopes.sum(1, keepdim=True)], 1)
    by_pixel = (corners[..., chosen, None] * slopes[:, :, None]).sum(1).flatten(1)
    return values, attr.new_zeros(*rast.shape[:3], 2 * len(chosen)).index_put(place, by_pixel)


def texture(
    tex,
    uv,
    uv_da=None,
    mip_level_bias=None,
    mip=None,
    filter_mode="auto",
    boundary_mode="wrap",
    max_mip_level=None,
):
    if filter_mode == "auto":
        filter_mode = "linear" if uv_da is None else "linear-mipmap-linear"
    if boundary_mode != "clamp" or mip_level_bias is not None or mip is not None:
        raise NotImplementedError("the stand-in clamps, and builds its own mip maps")
    _check(tex, "tex", torch.float32, (None, None, None, None))
    _check(uv, "uv", torch.float32, (None, None, None, 2))
    assert len(tex) in (1, len(uv)), "minibatch size mismatch between inputs tex, uv"
    if max_mip_level == 0:
        filter_mode = "linear"
    if filter_mode == "linear":
        return _bilinear(tex, uv)
    assert filter_mode == "linear-mipmap-linear", filter_mode
    _check(uv_da, "uv_da", torch.float32, (*uv.shape[:3], 4))
    levels = [tex]
    while max(levels[-1].shape[1:3]) > 1 and len(levels) - 1 != max_mip_level:
        height, width = levels[-1].shape[1:3]
        assert not any(extent > 1 and extent % 2 for extent in (height, width)), "cannot downsample an odd extent"
        levels.append(torch.nn.functional.avg_pool2d(levels[-1].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
    texels = uv_da.unflatten(-1, (2, 2)) * torch.tensor([[tex.shape[2]], [tex.shape[1]]])
    xx, yy, xy = (
        (texels[..., i] * texels[..., j]).sum(-1) for i, j in ((0, 0), (1, 1), (0, 1))
    )  # a pixel's footprint in texels is an ellipse: its longer half axis decides
    longest = (xx + yy) / 2 + (((xx - yy) / 2) ** 2 + xy**2 + 1e-30).sqrt()
    level = (0.5 * torch.log2(longest.clamp(min=1e-20))).clamp(0, len(levels) - 1)
    stack = torch.stack([_bilinear(texels, uv) for texels in levels])
    lower = level.detach().floor().long().clamp(max=max(len(levels) - 2, 0))
    share = (level - lower)[..., None]

    def chosen(index):
        return stack.gather(0, index[None, ..., None].expand(1, *stack.shape[1:]))[0]

    return chosen(lower) * (1 - share) + chosen((lower + 1).clamp(max=len(levels) - 1)) * share


def _bilinear(tex, uv):
    height, width = tex.shape[1:3]
    x = (uv[..., 0] * width - 0.5).clamp(0, width - 1)
    y = (uv[..., 1] * height - 0.5).clamp(0, height - 1)
    left, top = x.detach().floor().long(), y.detach().floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    image = torch.arange(len(tex))[:, None, None] if len(tex) > 1 else 0
    x, y = (x - left)[..., None], (y - top)[..., None]
    upper = tex[image, top, left] * (1 - x) + tex[image, top, right] * x
    lower = tex[image, bottom, left] * (1 - x) + tex[image, bottom, right] * x
    return upper * (1 - y) + lower * y


def antialias_construct_topology_hash(tri):
    _check(tri, "tri", torch.int32, (None, 3))
    return TopologyHash(tri)


def antialias(color, rast, pos, tri, topology_hash=None, pos_gradient_boost=1.0):
    assert pos_gradient_boost == 1.0
    _check(color, "color", torch.float32, (*rast.shape[:3], None))
    _check(rast, "rast", torch.float32, (None, None, None, 4))
    _check(pos, "pos", torch.float32, (len(rast), None, 4))
    topology_hash = TopologyHash(tri) if topology_hash is None else topology_hash
    size = torch.tensor([rast.shape[2], rast.shape[1]])
    out = color
    for axis in (0, 1):  # neighbours along x, then along y
        step = (0, 1) if axis == 0 else (1, 0)
        height, width = rast.shape[1] - step[0], rast.shape[2] - step[1]
        here, there = rast[:, :height, :width].detach(), rast[:, step[0] :, step[1] :].detach()
        for view, row, column in torch.nonzero(here[..., 3] != there[..., 3]).tolist():
            pair = torch.stack([here[view, row, column], there[view, row, column]])
            far = torch.where(pair[:, 3] > 0, pair[:, 2], torch.inf)
            front = int(far.argmin())
            pixels = [(view, row, column), (view, row + step[0], column + step[1])]
            near, other = pixels[front], pixels[1 - front]
            face = tri[int(pair[front, 3]) - 1].tolist()
            centre = torch.tensor([near[2] + 0.5, near[1] + 0.5])
            cut = _silhouette(pos[view], face, centre, size, axis, 1 - 2 * front, topology_hash)
            if cut is None:
                continue
            place = near if cut < 0.5 else other
            index = tuple(torch.tensor([part]) for part in place)
            difference = color[near] - color[other]
            out = out.index_put(index, ((cut - 0.5) * difference)[None], accumulate=True)
    return out


def _silhouette(pos, face, centre, size, axis, direction, topology_hash):
    """Where, from one pixel's centre (0) to its neighbour's (1), a silhouette edge of a triangle passes; or None."""

    def project(vertex):
        return (pos[vertex, :2] / pos[vertex, 3] + 1) / 2 * size - centre

    cuts = []
    corners = [project(vertex) for vertex in face]
    for corner in range(3):
        a, b, own = corners[corner - 2], corners[corner - 1], corners[corner]
        along, across = b - a, (b - a)[1 - axis]
        if bool((a[1 - axis] < 0) == (b[1 - axis] < 0)):
            continue
        cut = direction * (a[axis] - a[1 - axis] / across * along[axis])
        opposite = topology_hash.across(face[corner - 2], face[corner - 1], face[corner])
        side = _turn(along, own - a)
        folded = opposite < 0 or bool(_turn(along, project(opposite) - a) * side > 0)
        cuts.append((cut, folded and bool(along[1 - axis].abs() >= along[axis].abs())))
    if not cuts:
        return None
    cut, is_silhouette = max(cuts, key=lambda found: found[0].item())
    return cut.clamp(0, 1) if is_silhouette and -1 / 16 < cut.item() < 1 + 1 / 16 else None


def _turn(first, second):
    return first[0] * second[1] - first[1] * second[0]
