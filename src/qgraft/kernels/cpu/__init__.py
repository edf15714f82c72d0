"""HOW it is computed on a CPU: plain C behind ctypes.

    library.py, sources.py   the library: where it lies, what it was made from, which level of CPU it runs as
    abi.py                   the structures and arguments of its functions, as C lays them out
    packed.py                products with packed weights; and torch's between unpacked panels, where C has none
    lora.py, pointwise.py, varlen_attention.py, decode.py   the other rows of the table (kernels/table.py)
    *.c                      shared out to threads, checked; the loops are in the headers, for each level of CPU (level.h)

ctypes, not a torch extension: the library then fits every torch release and builds without torch's headers.
"""
