"""The maths of PLoRA: layers, injection into Hugging Face models, folding, objectives, and the fit of one user's vector.

Needs torch and transformers only; imports no other room of the house.
"""

from plora_ray.adapters.model import AdapterSpec, PersonalizedModel

__all__ = ["AdapterSpec", "PersonalizedModel"]
