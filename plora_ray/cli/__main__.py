"""`python -m plora_ray.cli`: the `plora` command without an installed script."""

from plora_ray.cli import app

app()
