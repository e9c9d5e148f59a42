"""`launch.py` with a fault given by `ULYSSES_TEST_FAULT`, for what a test cannot do to a rank from outside.

`raise:RANK:STEP`  the rank's forward pass raises in that step
`hang:RANK:STEP`   the rank's forward pass never returns, though its other threads live
`flip`             the mode changes with every step, regardless of the policy
"""

import os
import time

from ulysses_infer.cli.rank import main
from ulysses_infer.server import serve
from ulysses_infer.worker.worker import Worker

run, warm_up = Worker.run, serve.warm_up


def faulty_run(self, plan, choose=None, pool=None):
    kind, rank, step = os.environ["ULYSSES_TEST_FAULT"].split(":")
    if os.environ.get("RANK", "0") == rank and plan.sequence == int(step):
        if kind == "raise":
            raise ValueError("a fault to order")
        time.sleep(3600)
    return run(self, plan, choose, pool)


def flipping_warm_up(engine):
    warm_up(engine)
    modes, steps = engine.config.parallel.available_modes, iter(range(10**9))
    engine.choose_mode = lambda batch: modes[next(steps) % len(modes)]


def start(arguments):
    """Serve, with the fault if there is one."""
    fault = os.environ.get("ULYSSES_TEST_FAULT", "")
    if fault == "flip":
        serve.warm_up = flipping_warm_up
    elif fault:
        Worker.run = faulty_run
    main(arguments)
