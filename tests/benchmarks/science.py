"""The studies of the two papers' claims, on a synthetic dome: ``python tests/benchmarks/science.py --scratch DIR``.

Trains every method on the same batches, chooses the DAM's weight of the KL and every method's fit on validation
segments, and measures held-out segments, what matters most first. The full study took 15,700 CPU seconds, two hours and
a quarter of two cores:

    data (synthetic dome, shards)                  270
    33 trainings                                10,650
    168 fits, to validation and held-out frames  3,460
    samples, reconstructions                       490
    uncertainty of the priors                      220
    densities of frozen codes                      600

and some minutes for pictures of random faces, if --face is given: a small study of the procedural head.

The tables are printed at the end. With ``--scratch`` a killed run goes on where it was, and ``--stop-after MINUTES``
begins no task after so long, finishes those that run and prints what there is: the same command goes on later. After
changes of the code, take another folder. ``--quick`` shows in two minutes that everything runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from science_figures import draw_curves, draw_random_faces
from science_runner import Runner, StoppedEarly
from science_sizes import full_study, portrait_study, quick_study
from science_study import Stages
from science_tables import all_tables


def main() -> None:
    """Run what is not done yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument(
        "--face", type=Path, help="folder of a real face asset with its KRT; default: the procedural head"
    )
    parser.add_argument("--scratch", type=Path, help="keep captures, avatars and results here; a killed run goes on")
    parser.add_argument("--figures", type=Path, help="folder for the figures; default: the scratch folder's")
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="begin no task then; show what there is")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one core each")
    given = parser.parse_args()
    face = None if given.face is None else given.face.absolute()
    with ExitStack() as stack:
        scratch = given.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="science-")))
        scratch = (
            scratch.absolute() / ("quick" if given.quick else "full") / ("procedural" if face is None else face.name)
        )
        scratch.mkdir(parents=True, exist_ok=True)
        study = quick_study(face) if given.quick else full_study(face)
        stop_after_s = None if given.stop_after is None else 60 * given.stop_after
        runner = stack.enter_context(Runner(scratch, given.workers, stop_after_s))
        try:
            stages = Stages(study, runner, given.workers)
        except StoppedEarly:
            return runner.note("the time is over before the data are made: the same command goes on from here")
        found = stages.run()
        print(all_tables(found, study.dam_iterations))
        figures = given.figures or scratch / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        draw_curves(found, figures)
        if not found.complete:
            runner.note("pictures of random faces are drawn when all is done")
        elif face is None:
            draw_random_faces(found.portrayed, scratch, figures)
        else:
            # Pictures are of the procedural head alone: a real face is not to be published by accident.
            aside = scratch.with_name("portraits")
            small = quick_study(None) if given.quick else portrait_study()
            stages = Stages(small, stack.enter_context(Runner(aside, given.workers)), given.workers)
            portraits = stages.portraits(found.latent_weights)
            draw_random_faces(portraits, aside, figures)
        named = {
            name: {" ".join(key): value for key, value in asdict(found)[name].items()} for name in ("choices", "cpu_s")
        }
        document = asdict(found) | named
        (scratch / "findings.json").write_text(json.dumps(document))
        runner.note(f"figures in {figures}, all rows in {scratch / 'findings.json'}")


if __name__ == "__main__":
    main()
