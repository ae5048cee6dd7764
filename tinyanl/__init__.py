"""Transfer a pretrained latent diffusion model to a few pictures, by training small modules in
it."""
import os
import sys

# Threads that wait for each other by spinning stop dead where they share a core with another
# program: on 2 cores beside one busy program, training is 6 times slower. Waiting threads give
# their core away if OpenMP is told so before torch loads it.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
