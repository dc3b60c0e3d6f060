"""One validated tree of settings. Unknown keys are errors that name the nearest valid key; nothing is read elsewhere.

Secrets don't belong here: S3 credentials, the store's key and token keys come from the environment or from files.
"""

from plora_ray.config.encryption import EncryptionSettings, ServerSideSettings
from plora_ray.config.evaluation import EvaluationSettings
from plora_ray.config.loading import load_settings, parse_settings
from plora_ray.config.model import AdapterSettings, ModelSettings, RetentionSettings, StoreSettings
from plora_ray.config.serving import AuditSettings, AuthSettings, LimitSettings, ServingSettings
from plora_ray.config.training import AdamSettings, MlflowSettings, TrainingSettings
from plora_ray.config.tree import ADAM_LEARNING_RATES, Settings

__all__ = [
    "ADAM_LEARNING_RATES", "AdamSettings", "AdapterSettings", "AuditSettings", "AuthSettings", "EncryptionSettings", "EvaluationSettings",
    "LimitSettings", "MlflowSettings", "ModelSettings", "RetentionSettings", "ServerSideSettings", "ServingSettings", "Settings",
    "StoreSettings", "TrainingSettings", "load_settings", "parse_settings",
]  # fmt: skip
