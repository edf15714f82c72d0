"""Run the kernel, linear and merging tests on every level below this CPU's own, and in plain torch. `make test-levels`.

The CPU's own level is what `make test` runs them on. torch is told the same level as far as it listens: its own vector
loops, oneDNN and MKL are separate.
"""

import os
import subprocess
import sys
import time

from qgraft.kernels.cpu import library

TESTS = ["tests/kernels", "tests/test_linear.py", "tests/merging"]
WITHOUT = "not slow and not cuda and not triton"  # Triton's kernels know no level
TORCH = {  # level -> ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS
    "plain": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512-vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512-bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": (),  # as the CPU is
}


def main() -> int:
    """Exit code 1 if a level fails; the others run nevertheless."""
    loaded = library.load()
    if loaded is None:
        print(f"native kernels are {library.native_status()[1]}: only plain torch is tested")
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    runs = {"reference": {"QGRAFT_KERNELS": "reference"}}
    for level in library.levels(loaded)[:-1] if loaded else ():
        runs[level] = {"QGRAFT_CPU_LEVEL": level, **dict(zip(names, TORCH[level], strict=False))}
    failed = []
    for name, variables in runs.items():
        print(f"== {name}: {' '.join(f'{key}={value}' for key, value in variables.items())}", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", *(sys.argv[1:] or ["-n", "2"]), *TESTS, "-m", WITHOUT]
        if name != "reference":
            command += ["-k", "not reference-"]  # what each level would repeat
        code = subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
        print(f"== {name}: {'failed' if code else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
        failed += [name] * bool(code)
    print(f"levels: {', '.join(runs)}; failed: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
