"""The section `parallel`: how a model is cut."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from engine.config.fields import Degree, DegreeOrAuto, Layers, NonNegative, Section, ZeroLevel
from engine.errors import ConfigError
from engine.schedules.table import recipe, schedule_names


def _known_schedule(value: str) -> str:
    try:
        recipe(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


ScheduleName = Annotated[str, AfterValidator(_known_schedule),
                         Field(json_schema_extra=lambda schema: schema.update(enum=[*schedule_names()]))]


class ParallelConfig(Section):
    """How the job is cut.  tensor × context × pipeline × data = number of processes."""

    tensor: Degree = 1
    pipeline: Degree = 1
    context: Degree = 1
    data: DegreeOrAuto = "auto"                              # auto: what processes are left
    sequence: bool = True                                    # sequence parallelism wherever tensor > 1
    schedule: ScheduleName = "1f1b"                          # a row of engine.schedules.table
    virtual_stages: Layers = 1                               # model chunks per pipeline stage
    zero: ZeroLevel = 1
    zero_shard: NonNegative = 0                              # ranks that share one copy of the ZeRO state; 0: all
    recompute: Literal["none", "selective", "full"] = "none"
    # how many layers recompute, of each stage the first: one number for all stages, or one each; null: all layers
    recompute_layers: NonNegative | tuple[NonNegative, ...] | None = None
    check_replicas_every: NonNegative = 0                    # steps between comparisons of copies; 0: at saves
    debug_collectives: bool = False                          # compare shapes and types over the ranks before each one
    reproducible: bool = False                               # one order of summation for every data-parallel size

    @property
    def model_parallel_size(self) -> int:
        """Processes that together hold one copy of the model."""
        return self.tensor * self.context * self.pipeline

    @property
    def data_size(self) -> int:
        """`data` as a number; an error where the world size is not known yet."""
        if isinstance(self.data, int):
            return self.data
        raise ConfigError("parallel.data is `auto`: the layout is known once the number of processes is "
                          "(resolve_layout)")

    @property
    def world_size(self) -> int:
        return self.model_parallel_size * self.data_size
