"""Cycles of the kernels' inner loops on CPUs that are not here, by llvm-mca's models of them."""
