"""Writes checkpoints for ever, to be killed; first checks what the last one left."""

import sys

import jax
import numpy as np

from grsd_jax.experiments.common.checkpoints import Checkpoints

SHAPE = (200, 300)

with Checkpoints(sys.argv[1], max_to_keep=1) as checkpoints:
    template = {"x": jax.ShapeDtypeStruct(SHAPE, np.float32)}
    step = checkpoints.latest_step() or 0
    for found in checkpoints.all_steps():
        values = np.asarray(checkpoints.restore(template, step=found)["x"])
        assert (values == found).all(), found
    print("going on", flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"x": np.full(SHAPE, step, np.float32)})
