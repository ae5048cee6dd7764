"""Transfer a pretrained latent diffusion model to a few pictures, by training small modules in
it."""
import os
import sys

# Threads that wait for each other by spinning slow down where they share a core with another
# program. Waiting threads give their core away if OpenMP is told so before torch loads it. Training
# ANL, images a second on 2 cores of a server CPU, without and with it: 75 and 79 alone, 28 and 42
# beside one busy program, 15 and 35 beside two.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
