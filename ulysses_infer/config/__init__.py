"""The recipe: schema, loading and validation."""

from ulysses_infer.config.device import choose_for_device
from ulysses_infer.config.loading import load_config
from ulysses_infer.config.policy import PolicyConfig
from ulysses_infer.config.reference import resolved_yaml, schema_reference
from ulysses_infer.config.schema import (
    CacheConfig,
    Config,
    GenerateConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from ulysses_infer.config.server import ServerConfig
from ulysses_infer.config.speculation import SpeculationConfig
from ulysses_infer.config.validation import refuse_unavailable

__all__ = [
    "CacheConfig",
    "Config",
    "GenerateConfig",
    "LoraConfig",
    "ModelConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RuntimeConfig",
    "SchedulerConfig",
    "ServerConfig",
    "SpeculationConfig",
    "choose_for_device",
    "load_config",
    "refuse_unavailable",
    "resolved_yaml",
    "schema_reference",
]
