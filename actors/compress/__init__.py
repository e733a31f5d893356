"""Gradients on their way between routers, in fewer bytes. Pure: no link is known here.

PyTorch's own hooks (`torch.distributed.algorithms.ddp_comm_hooks`) do not fit: they run inside the all-reduce of a DDP
model and its process group, and here each pair of routers has a link of its own that either may lose.
"""
