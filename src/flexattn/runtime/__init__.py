"""Calls on a device: launches, autograd, operators."""

from importlib import import_module

from flexattn.analysis.block_sparsity import SOLVERS

# Imported with the first block mask on a GPU: imports cost time.
SOLVERS["cuda"] = lambda: import_module("flexattn.runtime.launch_block_mask")
