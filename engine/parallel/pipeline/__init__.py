"""Pipeline parallelism: one executor runs any schedule (`engine.schedules`); layers are dealt to its chunks."""
