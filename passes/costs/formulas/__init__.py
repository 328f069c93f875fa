"""Cost formulas, a file per group of families. Importing this package registers all of them."""
from genie_dynamo.passes.costs.formulas import elementwise, matrix, memory, reductions

__all__ = ["elementwise", "matrix", "memory", "reductions"]
