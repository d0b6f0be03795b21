"""Pages and pictures of runs, layouts and schedules, as HTML and SVG that need nothing else."""
