"""The models of the paper: composition of `fastvae.nn` and `fastvae.objective`, nothing else."""
