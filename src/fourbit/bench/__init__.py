"""Our kernels and training step beside each installed peer, in one run on one machine.

One file per measured thing holds its cases (`quantize`, `dequantize`, `linear`, `load`, `step`, and `machine`, what the
machine itself can do); `registry` lists them, `run` measures them, `rows` keeps the results, `report` compares them.
"""
