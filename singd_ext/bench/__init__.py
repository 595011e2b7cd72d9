"""What SINGD costs on your machine: `python -m singd_ext.bench` (docs/benchmarks.md).

`cli` reads the command line and runs one of `training`, `kernels`, `traffic` and `profiling`, each
of which returns rows of figures (`results`); `report`, `plots` and `compare` show them.
"""
