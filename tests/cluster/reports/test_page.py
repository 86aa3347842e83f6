"""The report is one file that needs nothing else, tells the truth about its input and escapes it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cluster.reports.charts import Chart, chart_svg
from cluster.reports.page import HeadlineRow, Measured, Picture, QuadrantRow, ReportContent, print_table, render_report
from cluster.reports.pictures import (
    ERROR_FULL_SCALE,
    absolute_error,
    comparison_row,
    contact_sheet,
    expose,
    heat_map,
    suggested_exposure,
)
from pipeline import storage

HEADLINE = (
    HeadlineRow("mean face", None, Measured(22.0), Measured(3.25)),
    HeadlineRow("dam", "hmc", Measured(30.0, 29.5, 30.5), Measured(2.0, 1.9, 2.1)),
    HeadlineRow("lipflow", "hmc", Measured(31.5, 31.0, 32.0), Measured(2.125, 2.0, 2.2)),
    HeadlineRow("dam", "keypoints", Measured(float("nan")), Measured(1.5)),
    HeadlineRow("lipflow", "keypoints", Measured(28.0), Measured(float("nan"))),
)


def random_image(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


class Page(HTMLParser):
    """The tags of a page with their attributes, and whether every opened tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "circle", "polyline", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def content() -> ReportContent:
    return ReportContent(
        title="Demo <script>alert(1)</script>",
        summary="LiP-Flow wins & more.",
        headline=HEADLINE,
        protocol="held-out expressions",
        reading=("The mean face is the mean mesh.",),
        quadrants=(QuadrantRow("dam", "held-out", "training", Measured(29.0), Measured(1.25), 12, Measured(0.9)),),
        pictures=(
            *(Picture(f"Driven by {index}", "photo", random_image(index)) for index in range(3)),
            Picture("Large", "noise", random_image(9, 500, 500)),
        ),
        training_curves=(Chart("Loss <i>", "step", "loss", {"a&b": ([0, 1, 2], [3.0, 2.0, 1.0])}, log_y=True),),
        fit_curves=(Chart("Fit", "iteration", "loss", {"hmc": ([0, 1], [1.0, 0.5])}),),
        facts={"Runs": {"train": "abc123"}, "Environment": {"store": "http://user:hunter22@host/"}},
        config={"model": {"latent_size": 16}, "aws_secret_access_key": "abcdefgh"},
    )


@pytest.fixture(scope="module")
def html(content, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    render_report(path, content)
    return path.read_text()


def test_report_fetches_nothing_and_runs_nothing(html):
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_report_embeds_every_picture_exactly_and_describes_it(html, content):
    images = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    assert len(images) == len(content.pictures)
    for attributes, picture in zip(images, content.pictures, strict=True):
        assert attributes["alt"].startswith(picture.title)
        kind, body = attributes["src"].removeprefix("data:image/").split(";base64,")
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))
        assert decoded.shape == picture.image.shape
        if kind == "png":
            assert np.array_equal(decoded, picture.image)
    assert [attributes["src"][:15] for attributes in images] == ["data:image/png;"] * 3 + ["data:image/jpeg"]


def test_report_escapes_what_it_is_given(html):
    assert "<script>alert" not in html
    assert "Demo &lt;script&gt;" in html
    assert "Loss &lt;i&gt;" in html
    assert "a&amp;b" in html


def test_report_shows_no_secret(html):
    assert "hunter22" not in html
    assert "abcdefgh" not in html
    assert "latent_size" in html


def test_headline_marks_the_best_of_each_signal_and_puts_references_last(html):
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html[html.index("<tbody") : html.index("How to read")], re.S)
    assert "hmc" in rows[0]
    assert "keypoints" in rows[2]
    assert "mean face" in rows[4]
    assert re.findall(r'class="n best"><span>([\d.]+)', rows[0]) == ["2.000"]
    assert re.findall(r'class="n best"><span>([\d.]+)', rows[1]) == ["31.50"]
    assert re.findall(r'class="n best"><span>([\d.]+)', rows[2] + rows[3]) == ["1.500", "28.00"]
    assert "best" not in rows[4]
    assert "29.50–30.50" in rows[0]
    assert "<span>–</span>" in rows[2]


def test_tables_have_header_cells_with_a_scope(html):
    headers = [attributes for tag, attributes in Page(html).tags if tag == "th"]
    assert headers
    assert all(attributes["scope"] in ("col", "row", "rowgroup") for attributes in headers)


def test_report_with_a_headline_alone_is_complete(tmp_path):
    render_report(storage.normalize_uri(tmp_path / "plain.html"), ReportContent("t", "s", HEADLINE[:1]))
    html = (tmp_path / "plain.html").read_text()
    assert Page(html).open == []
    assert "Pictures" not in html
    assert "95 % interval" not in html


def test_terminal_table_shows_the_same_rows():
    console = Console(width=100, file=io.StringIO(), record=True)
    print_table(HEADLINE, console, title="Held-out [expressions]")
    text = console.export_text()
    assert text.index("dam") < text.index("keypoints") < text.index("mean face")
    for figure in ("31.50 (31.00–32.00)", "2.000", "3.250", "–"):
        assert figure in text


@pytest.mark.parametrize(
    "values",
    [[], [float("nan")], [1.0], [2.0, 2.0], [1.0, float("nan"), 2.0, 3.0], [-1.0, 0.0, 1.0], [1e-9, 1e9]],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_charts_of_any_values_are_drawn_inside_their_frame(values, log_y):
    svg = chart_svg(Chart("t", "x", "y", {"c": (range(len(values)), values)}, log_y=log_y))
    assert "nan" not in svg
    points = [
        tuple(map(float, pair.split(","))) for path in re.findall(r'points="([^"]*)"', svg) for pair in path.split()
    ]
    assert all(0 <= x <= 560 and 0 <= y <= 300 for x, y in points)


def test_long_curves_are_thinned_without_bias():
    values = np.tile([0.0, 1.0], 5000)
    svg = chart_svg(Chart("t", "x", "y", {"c": (np.arange(10000), values), "range": ([0, 1], [0.0, 1.0])}))
    ys = [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]*)"', svg)[0].split()]
    assert len(ys) == 400
    assert np.ptp(ys) < 12


def test_error_and_heat_map_state_colour_levels():
    photo = np.full((2, 3, 3), 100, np.uint8)
    other = photo.copy()
    other[0, 0] = (110, 90, 110)
    error = absolute_error(photo, other)
    assert error[0, 0] == 10
    assert error.sum() == 10
    assert absolute_error(photo, other, mask=np.zeros((2, 3))).max() == 0
    heat = heat_map(np.array([[0.0, ERROR_FULL_SCALE, 2 * ERROR_FULL_SCALE]]))
    assert heat[0, 0].sum() < 10
    assert np.array_equal(heat[0, 1], heat[0, 2])
    with pytest.raises(ValueError, match="differ in size"):
        absolute_error(photo, other[:1])


def test_exposure_changes_the_pictures_but_not_the_error():
    photo, reconstruction = random_image(0) // 4, random_image(1) // 4
    plain, bright = comparison_row(photo, reconstruction), comparison_row(photo, reconstruction, exposure=2.0)
    assert np.array_equal(bright[0], photo * 2)
    assert np.array_equal(bright[2], plain[2])
    assert np.array_equal(expose(photo), photo)
    assert suggested_exposure([photo]) > 3
    assert suggested_exposure([np.zeros((4, 4, 3), np.uint8)]) == 1.0


def test_contact_sheet_places_tiles_of_mixed_sizes_side_by_side():
    rows = [
        comparison_row(random_image(0), random_image(1)),
        comparison_row(random_image(2, 48, 30), random_image(3, 48, 30)),
    ]
    sheet = contact_sheet(rows, row_labels=["hmc", "keypoints\nE057"], title="a title", tile_height_px=60)
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] > 2 * 60
    assert sheet.shape[1] > 3 * 80
    with pytest.raises(ValueError, match="row labels"):
        contact_sheet(rows, row_labels=["one"])
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet([[np.zeros((4, 4, 3))]])
