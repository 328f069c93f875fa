"""Which rows of a batch a graph keeps apart, and the same graph over parts of the batch.

    graph -> flow.py: which values have rows, along which dim -> split.py: the graph with k copies of what has rows

    call.py      one op's arguments, with the dim along which each has rows
    registry.py  the rule of each op family; elementwise.py, views.py, matrix.py, reductions.py, layers.py, gathers.py

A rule says when an op on a part of the rows gives that part of the result. What has no rule is taken to mix rows.
"""
