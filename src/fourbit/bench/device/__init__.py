"""What one device does with 4-bit weights, measured in one call that fits into a lease of ten minutes.

`fourbit bench` starts a process per contender, which is fair and slow. On a borrowed GPU time is short, so here a
*section* is one process that measures its cases with all contenders in turns; `sections` lists them, `driver` starts
them under a budget of seconds each, so that one that crashes or hangs costs only itself, and `summary` prints what came
of the bars. Rows are written as soon as a case is measured, into the same kind of CSV file.

Everything here also runs on a CPU, with tiny shapes: that is how it is tested.
"""
