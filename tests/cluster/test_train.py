"""What a second submission of a training takes over from the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.train import with_micro_batches
from cluster.training.recipe import TrainRecipe
from lipflow.errors import ConfigError


def test_a_training_keeps_its_micro_batches_whatever_the_number_of_workers(tmp_path: Path):
    first = with_micro_batches(str(tmp_path), TrainRecipe(workers=4))
    assert first.micro_batches == 4
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(first.model_dump(mode="json")))
    fewer = with_micro_batches(str(tmp_path), TrainRecipe(workers=3))
    assert (fewer.workers, fewer.micro_batches) == (3, 4)
    with pytest.raises(ConfigError, match=r"workers is 5.*holds a training with 4 micro_batches.*to 4 or fewer"):
        with_micro_batches(str(tmp_path), TrainRecipe(workers=5))
    # What is said is compared with the recipe that is there, as every other setting.
    assert with_micro_batches(str(tmp_path), TrainRecipe(workers=5, micro_batches=6)).micro_batches == 6
