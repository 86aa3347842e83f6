"""Other libraries' loaders for ``loader.py``: webdataset, mosaicml-streaming and litdata, one sample a view.

Runs in the peers' own environment and imports nothing of this project (``tests/benchmarks/RESULTS.md`` says how to
make that environment): ``peers.py write KIND JSON`` writes a data set from files, ``peers.py read KIND JSON`` serves
timed passes over it, see :mod:`timed_rows`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timed_rows import serve

_SHARD_BYTES = 2**25


@dataclass(frozen=True)
class ViewFiles:
    """The two pictures of a sample; ``average`` is None where samples are photos alone."""

    image: Path
    average: Path | None


def listed_views(listing: Path) -> list[ViewFiles]:
    """From a JSON list of (image path, average texture path or null)."""
    return [
        ViewFiles(Path(image), None if average is None else Path(average))
        for image, average in json.loads(listing.read_text())
    ]


def write_webdataset(views: list[ViewFiles], folder: Path) -> None:
    """Two tars of samples ``image.EXT``, ``avgtex.png``."""
    import webdataset

    folder.mkdir(parents=True)
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:06d}.tar")) as tar:
            for number, view in list(enumerate(views))[shard::2]:
                sample = {"__key__": f"{number:06d}", f"image{view.image.suffix}": view.image.read_bytes()}
                if view.average is not None:
                    sample["avgtex.png"] = view.average.read_bytes()
                tar.write(sample)


def read_webdataset(folder: Path, batch: int, workers: int) -> Iterable[Any]:
    """The default decoding of pictures, ``rgb8``: Pillow, then numpy."""
    import webdataset

    names = [str(path) for path in sorted(folder.glob("*.tar"))]
    views = webdataset.WebDataset(names, shardshuffle=False).decode("rgb8").map(_pictures)
    return torch.utils.data.DataLoader(views, batch_size=batch, **_worker_options(workers))


def _pictures(sample: dict[str, Any]) -> list[np.ndarray]:
    return [value for name, value in sorted(sample.items()) if not name.startswith("__")]


def write_streaming(views: list[ViewFiles], folder: Path) -> None:
    """MDS shards of the files' bytes: what its ``jpeg`` encoding stores, and ``png`` without encoding anew."""
    from streaming import MDSWriter

    columns = {"image": "bytes"} | ({"average": "bytes"} if views[0].average is not None else {})
    with MDSWriter(out=str(folder), columns=columns, size_limit=_SHARD_BYTES) as writer:
        for view in views:
            sample = {"image": view.image.read_bytes()}
            if view.average is not None:
                sample["average"] = view.average.read_bytes()
            writer.write(sample)


def read_streaming(folder: Path, batch: int, workers: int) -> Iterable[Any]:
    """Shuffled; decoded as its ``jpeg`` and ``png`` encodings do, by ``Image.open``."""
    from streaming import StreamingDataset

    class Views(StreamingDataset):
        def __getitem__(self, place: int) -> list[np.ndarray]:
            return [np.asarray(Image.open(io.BytesIO(body))) for body in super().__getitem__(place).values()]

    views = Views(local=str(folder), shuffle=True, batch_size=batch)
    return torch.utils.data.DataLoader(views, batch_size=batch, **_worker_options(workers))


def _litdata_sample(files: tuple[str, str | None]) -> dict[str, Any]:
    from litdata import Image as EncodedImage

    image, average = files
    return {"image": EncodedImage(path=image)} | ({"average": EncodedImage(path=average)} if average else {})


def write_litdata(views: list[ViewFiles], folder: Path) -> None:
    """Chunks of its ``Image`` fields, which keep the files' bytes."""
    import litdata

    inputs = [(str(view.image), None if view.average is None else str(view.average)) for view in views]
    litdata.optimize(fn=_litdata_sample, inputs=inputs, output_dir=str(folder), chunk_bytes=_SHARD_BYTES, num_workers=1)


def read_litdata(folder: Path, batch: int, workers: int) -> Iterable[Any]:
    """Shuffled; its own decoding, which is torchvision's."""
    from litdata import StreamingDataLoader, StreamingDataset

    views = StreamingDataset(str(folder), shuffle=True)
    return StreamingDataLoader(views, batch_size=batch, **_worker_options(workers))


def _worker_options(workers: int) -> dict[str, Any]:
    """One worker is this process itself."""
    return {"num_workers": 0} if workers == 1 else {"num_workers": workers, "persistent_workers": True}


WRITERS: dict[str, Callable[[list[ViewFiles], Path], None]] = {
    "webdataset": write_webdataset,
    "streaming": write_streaming,
    "litdata": write_litdata,
}
READERS: dict[str, Callable[[Path, int, int], Iterable[Any]]] = {
    "webdataset": read_webdataset,
    "streaming": read_streaming,
    "litdata": read_litdata,
}


def passes(kind: str, folder: Path, batch: int) -> Callable[[int], int]:
    """Epochs of a peer's loader."""
    __import__(kind)
    loaders: dict[int, Iterable[Any]] = {}

    def sizes(workers: int) -> Iterator[int]:
        if workers not in loaders:
            loaders[workers] = READERS[kind](folder, batch, workers)
        for found in loaders[workers]:
            yield len(found["image"] if isinstance(found, dict) else found[0])

    return lambda workers: sum(sizes(workers))


if __name__ == "__main__":
    torch.set_num_threads(1)
    action, kind, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if action == "write":
        WRITERS[kind](listed_views(Path(arguments["listing"])), Path(arguments["folder"]))
    else:
        serve(passes(kind, Path(arguments["folder"]), arguments["batch"]))
