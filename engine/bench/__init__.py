"""The benchmarks behind `octant bench`: each a module with `run(arguments) -> exit code` on top of
`engine.bench.harness`."""
