"""tinyanl: transferring pretrained diffusion models with Attention-NonLinear modules. Start reading at anl.py or train.py."""
