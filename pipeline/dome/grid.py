"""Connectivity of the procedural head: a grid of rows and columns with slits that are closed by webs."""

from __future__ import annotations

import numpy as np

SLITS = ("mouth", "eye_left", "eye_right")
WEB_LEVELS = 6
"""Rows of quads in the web of a slit."""


class GridBuilder:
    """Connectivity of the grid: vertices are (row, column, slit, level); the last column meets the first."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray):
        self.rows, self.columns = rows, columns
        self.vertices: list[tuple[int, int, int, float]] = []
        self.faces: list[tuple[int, int, int]] = []
        self.uv_faces: list[tuple[int, int, int]] = []
        self.webs: dict[str, list[int]] = {}
        self._upper: dict[tuple[int, int], int] = {}
        self._wrap = len(columns) - 1
        for row in range(len(rows)):
            for column in range(self._wrap):
                self._add(row, column, -1, 0.5)
        self._pole = self._add(len(rows), self._wrap // 2, -1, 0.5)
        self._extra_uv: dict[tuple[int, float], int] = {}

    def _add(self, row: int, column: int, slit: int, level: float) -> int:
        self.vertices.append((row, column, slit, level))
        return len(self.vertices) - 1

    def cut(self, name: str, row_y: float, first_deg: float, last_deg: float) -> None:
        """Open a slit along a row between two columns and close it with a web."""
        row = int(np.flatnonzero(self.rows == row_y)[0])
        first, last = (int(np.flatnonzero(self.columns == angle)[0]) for angle in (first_deg, last_deg))
        slit, levels = SLITS.index(name), WEB_LEVELS
        ladder: dict[int, list[int]] = {}
        for column in (first, last):
            vertex = row * self._wrap + column
            self.vertices[vertex] = (row, column, slit, 0.5)
            ladder[column] = [vertex] * (levels + 1)
        for column in range(first + 1, last):
            lower = row * self._wrap + column
            self.vertices[lower] = (row, column, slit, 0.0)
            ladder[column] = [lower, *(self._add(row, column, slit, k / levels) for k in range(1, levels + 1))]
            self._upper[row, column] = ladder[column][-1]
        self.webs[name] = []
        for column in range(first, last):
            for level in range(levels):
                start = len(self.faces)
                left, right = ladder[column], ladder[column + 1]
                self._quad((left[level], right[level], right[level + 1], left[level + 1]), split=column % 2)
                self.webs[name] += range(start, len(self.faces))

    def fill(self) -> None:
        """The quads of the grid and the fan at the crown; called once, after the cuts."""
        for row in range(len(self.rows) - 1):
            for column in range(self._wrap):
                low = [self._upper.get((row, c), row * self._wrap + c % self._wrap) for c in (column, column + 1)]
                high = [(row + 1) * self._wrap + c % self._wrap for c in (column, column + 1)]
                at_seam = column + 1 == self._wrap
                uv = [low[0], self._uv(low[1], self._wrap, needed=at_seam)]
                uv += [self._uv(high[1], self._wrap, needed=at_seam), high[0]]
                self._quad((low[0], low[1], high[1], high[0]), uv, split=int(self.columns[column] >= 0))
        top = (len(self.rows) - 1) * self._wrap
        for column in range(self._wrap):
            left, right = top + column, top + (column + 1) % self._wrap
            right_uv = self._uv(right, self._wrap, needed=column + 1 == self._wrap)
            self.faces.append((left, right, self._pole))
            self.uv_faces.append((left, right_uv, self._uv(self._pole, column + 0.5, needed=True)))

    def _uv(self, vertex: int, column: float, *, needed: bool) -> int:
        """The uv of a vertex; one of its own at ``column`` where the vertex' own uv lies elsewhere."""
        if not needed:
            return vertex
        if (vertex, column) not in self._extra_uv:
            self._extra_uv[vertex, column] = -1 - len(self._extra_uv)
        return self._extra_uv[vertex, column]

    def _quad(self, corners: tuple[int, ...], uv: list[int] | None = None, *, split: int) -> None:
        uv = list(corners) if uv is None else uv
        for a, b, c in ((0, 1, 2), (0, 2, 3)) if split else ((0, 1, 3), (1, 2, 3)):
            if len({corners[a], corners[b], corners[c]}) == 3:
                self.faces.append((corners[a], corners[b], corners[c]))
                self.uv_faces.append((uv[a], uv[b], uv[c]))

    def extra_uvs(self) -> list[tuple[int, float]]:
        """Vertex and column of the uvs beyond one a vertex, in index order; makes ``uv_faces`` final."""
        count = len(self.vertices)
        indices = np.array(self.uv_faces)
        self.uv_faces = [(a, b, c) for a, b, c in np.where(indices >= 0, indices, count - 1 - indices).tolist()]
        return list(self._extra_uv)
