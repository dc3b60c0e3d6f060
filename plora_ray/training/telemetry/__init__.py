"""Where the driver's view of a running job goes: the run's own history, TensorBoard files, an MLflow server.

Each is a `Sink` in a file of its own, fed by `Telemetry` from threads, so that none of them can hold up or end a training.
"""

from plora_ray.training.telemetry.sample import Meter, Sample
from plora_ray.training.telemetry.sink import Sink, Telemetry

__all__ = ["Meter", "Sample", "Sink", "Telemetry"]
