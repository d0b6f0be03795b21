"""Pipeline parallelism: a schedule is data (action, schedules, lowering, simulate: no torch), one executor runs any."""
