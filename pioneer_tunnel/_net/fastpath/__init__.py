"""An optimisation: the bytes of sockets without a task for each, by epoll and splice (Linux).

Everything works without it, see `event_loop.CAN_WATCH` and `pipe_pool.CAN_PIPE`.
"""
