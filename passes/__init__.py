"""Graph -> semantics -> plan -> fragments. Pure: no sockets, no processes."""
