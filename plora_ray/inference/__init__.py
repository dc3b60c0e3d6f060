"""The engine a replica runs: adapters in memory, mixed-user batches, few-shot fits. No Ray, no HTTP."""

from plora_ray.inference.engine import Answer, InferenceEngine
from plora_ray.inference.fewshot import Examples, FewShotFitter
from plora_ray.inference.loading import LoadedGeneration, load_generation

__all__ = ["Answer", "Examples", "FewShotFitter", "InferenceEngine", "LoadedGeneration", "load_generation"]
