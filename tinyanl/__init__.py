"""tinyanl: transfer a pretrained diffusion model with Attention-NonLinear modules. Start at anl.py or train.py."""
