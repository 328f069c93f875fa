"""The client's side: a session with its workers, what is resident where, and graphs that run there.

    connection.py   one socket to one worker, request and reply with a deadline
    residency.py    which tensors a worker holds, and whether they still are what the caller has
    swapping.py     torch.utils.swap_tensors, which wants nobody to refer to what it swaps
    calls.py        one call over several workers, as a state machine without I/O
    remote_graph.py a plan bound to workers: what torch calls
    saved.py        activations that stay on their worker between forward and backward
    session.py      one client's life with a set of workers
"""
