"""A worker: a process that owns one accelerator (or a CPU share), programs and resident tensors.

    state.py   the protocol as a state machine without I/O
    engine.py  loads programs and runs them, in slices
    shell.py   sockets and the loop that ties the two together
    main.py    run_worker: everything a worker process is
"""
