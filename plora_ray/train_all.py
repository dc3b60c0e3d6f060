"""The job's entry point: `python -m plora_ray.train_all --config FILE [--set key.path=value ...]`.

Runs on the Ray cluster it is submitted to (RAY_ADDRESS, as `ray job submit` sets it) or starts a local one.
"""

from __future__ import annotations

from plora_ray.cli import train_all_app

if __name__ == "__main__":
    train_all_app()
