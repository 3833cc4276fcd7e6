"""Ranks say hello and add up their arrays: meshring run -n 4 examples/hello.py."""

import numpy as np

import meshring as mr

comm = mr.init()
x = np.arange(4, dtype="float32") + comm.rank
total = comm.all_reduce(x.copy())
print(f"hello from rank {comm.rank} of {comm.size}: I gave {x}, all together have {total}")
comm.close()
