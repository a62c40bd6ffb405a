"""What serves the CUDA device: the GPU side's table of contents.

No op has a kernel of its own here yet: on a GPU the dispatcher runs each op's PyTorch reference.
"""
