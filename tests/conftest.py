import os
import signal
from functools import partial

import pytest
import torch

from tinyanl import models, sample, train
from tinyanl.experiments import semi_supervised

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side: a core for each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(scope="module")
def base():
    """The embedded models, on the CPU."""
    return models.load_base(device="cpu")


@pytest.fixture(autouse=True, scope="session")
def exact_and_quick():
    """Tests compare exact numbers: float32 even where the CPU has bf16. The grids that training
    draws take two steps, as they are not what is tried. Neither holds in processes that tests
    start. Ctrl-C is listened to, which a shell has its jobs in the background not do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, where it runs the tests, ignores it
    with pytest.MonkeyPatch.context() as patch:
        for module in (models, semi_supervised):
            patch.setattr(module, "has_bf16", lambda device: device.type == "cuda")
        patch.setattr(train, "sample", partial(sample.sample, steps=2))
        yield
