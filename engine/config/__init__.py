"""The configuration of a job: strict, typed, frozen, and without torch.

    config = load_config("tiny", ["optim.lr=3e-4"])                  # files, presets and overrides, merged and checked
    config = resolve_layout(config, 8)                               # parallel.data is a number, and everything divides
    print(config.dump())                                             # YAML, enough to run it again

Keys, defaults and units are in `schema`; the equations a layout must satisfy in `layout`; the names that
`parallel.schedule` may have in `engine.schedules.table`.
"""

from engine.config.alignment import AdapterConfig, DPOConfig, ORPOConfig, RewardConfig, SFTConfig
from engine.config.data import DataConfig, SourceConfig
from engine.config.layout import resolve_layout, role_configs, world_size_of
from engine.config.length import BatchConfig
from engine.config.load import config_names, load_config, preset_names
from engine.config.model import ModelConfig, RopeScalingConfig
from engine.config.parallel import ParallelConfig
from engine.config.precision import PrecisionConfig
from engine.config.reliability import FaultConfig, ReliabilityConfig, RewindConfig, SpikeConfig, WatchdogConfig
from engine.config.rl import (
    ActorConfig,
    CorrectionConfig,
    CriticConfig,
    GRPOConfig,
    OverlongConfig,
    Place,
    PPOConfig,
    RewardSource,
    RoleConfig,
    RolesConfig,
    RolloutConfig,
)
from engine.config.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ProfileConfig,
    RunConfig,
)

__all__ = [
    "ActorConfig", "AdapterConfig", "BatchConfig", "CheckpointConfig", "Config", "CorrectionConfig", "CriticConfig",
    "DPOConfig", "DataConfig", "EvalConfig", "FaultConfig", "GRPOConfig", "LogConfig", "ModelConfig", "ORPOConfig",
    "OptimConfig", "OverlongConfig", "PPOConfig", "ParallelConfig", "Place", "PrecisionConfig", "ProfileConfig",
    "ReliabilityConfig", "RewardConfig", "RewardSource", "RewindConfig", "RoleConfig", "RolesConfig", "RolloutConfig",
    "RopeScalingConfig", "RunConfig", "SFTConfig", "SourceConfig", "SpikeConfig", "WatchdogConfig", "config_names",
    "load_config", "preset_names", "resolve_layout", "role_configs", "world_size_of",
]
