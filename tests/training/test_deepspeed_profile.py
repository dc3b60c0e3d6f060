"""A file of further DeepSpeed settings adds to the job's own and never changes them unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plora_ray.errors import ConfigError
from plora_ray.training.deepspeed_profile import read_profile
from plora_ray.training.engine import EngineOptions, Offload, Sharding

PROFILES = sorted((Path(__file__).parents[2] / "cluster" / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_that_comes_along_is_accepted_and_keeps_our_own_settings(path: Path) -> None:
    sharding: Sharding = "replicated" if path.stem == "replicated" else "zero3"
    offload: Offload = "nvme" if "nvme" in path.stem else "cpu" if "cpu" in path.stem else "none"
    options = EngineOptions(sharding, offload, "/drive", read_profile(path, offload))
    section = options.zero_optimization()
    assert section["stage"] == (0 if sharding == "replicated" else 3)
    assert section.get("offload_param", {}).get("device", "none") == offload
    assert section.get("offload_param", {}).get("nvme_path") == ("/drive" if offload == "nvme" else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "SGD"}}, "sets 'optimizer'.*training.learning_rate"),
        ({"gradient_clipping": 0.0}, "sets 'gradient_clipping'"),
        ({"train_micro_batch_size_per_gpu": 4}, "training.batch_rows"),
        ({"zero_optimization": {"stage": 2}}, "'zero_optimization.stage'.*training.sharding"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "training.offload"),
        ({"zero_optimization": 3}, "'zero_optimization' must be an object, found int"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "'zero_optimization.offload_param' must be an object, found str"),
        ({"zero_optimization": {"offload_param": {"buffer_count": 6}}}, "training.offload is none: set that to cpu or nvme"),
        ([1], "must hold an object"),
    ],
)
def test_a_profile_that_sets_what_other_settings_decide_is_refused_by_name(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_profile(path)


def test_a_profile_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_profile(tmp_path / "bad.json")
