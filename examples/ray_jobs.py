"""Train many adapters on many machines, and collect their sealed folders. / 用 Ray 在多台机器上训练，收回适配器目录。

    pip install ray
    python examples/ray_jobs.py --workers 2 --output collected law.yaml med.yaml tax.yaml ...
    python examples/ray_jobs.py --address auto --shared /nfs/runs --output collected *.yaml r=16

Each machine runs `qgraft train a.yaml b.yaml ...` with `--together` of the configurations on one base. A worker that is
killed is one that Ray starts anew, on another machine if there is one: its jobs begin again, or go on from their last
checkpoint where all machines see the same `--shared` folder. A configuration that is wrong fails once, and others go on.
Paths in the configurations (model, rows) must be there on every machine.
每台机器执行 `qgraft train a.yaml b.yaml ...`；被杀掉的 worker 由 Ray 在别处重来，有 `--shared` 目录时从检查点继续。
"""

import argparse
import io
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import ray
import yaml

from qgraft.adapter_files.folder import changed_files
from qgraft.adapter_files.seal import read_seal
from qgraft.cli.main import main as qgraft


@ray.remote(num_cpus=1, max_retries=3)
def train(configs: dict[str, str], words: list[str], folder: str, shared: str | None) -> dict[str, bytes | None]:
    """Train these on this machine: a tar of each adapter's folder; None for one that failed. / 在这台机器上训练。"""
    os.chdir(folder)
    found: dict[str, bytes | None] = {}
    with tempfile.TemporaryDirectory() as scratch:
        outputs = {name: Path(shared or scratch) / name for name in configs}
        files = []
        for name, text in configs.items():
            files.append(str(Path(scratch) / f"{name}.yaml"))
            config = {**yaml.safe_load(text), "output_dir": str(outputs[name])}
            Path(files[-1]).write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        print(f"pid {os.getpid()}: {', '.join(configs)}", flush=True)
        qgraft(["train", *files, "resume_from_checkpoint=auto", *words])
        for name, output in outputs.items():
            found[name] = packed(output) if (output / "qgraft.json").is_file() else None
    return found


def packed(output: Path) -> bytes:
    """An adapter's folder without its checkpoints. / 适配器目录，不含检查点。"""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for path in sorted(output.iterdir()):
            if path.is_file():
                archive.add(path, path.name)
    return whole.getvalue()


def collected(output: Path, name: str, tar: bytes) -> str:
    """Write the folder, whole or not at all, and compare its files with its seal. / 写入目录，并用封印核对。"""
    unpacked = Path(tempfile.mkdtemp(dir=output, prefix=f".{name}-"))
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(unpacked, filter="data")
    changed = changed_files(unpacked, read_seal(unpacked))
    if changed:
        raise SystemExit(f"{name}: {', '.join(changed)} changed on the way")
    shutil.rmtree(output / name, ignore_errors=True)
    unpacked.rename(output / name)
    return f"{name}: {output / name}"


def main() -> int:
    """Hand out the jobs, collect what comes back. / 分发任务，收集结果。"""
    parser = argparse.ArgumentParser(description="train adapters over the workers of Ray")
    parser.add_argument("words", nargs="+", help="configurations (.yaml), and option=value for all of them")
    parser.add_argument("--output", required=True, help="folder for the adapters, each under its configuration's name")
    parser.add_argument("--workers", type=int, default=2, help="workers to start on this machine")
    parser.add_argument("--address", help="a cluster that is there already: auto, or ray://head:10001")
    parser.add_argument("--together", type=int, default=2, help="configurations that share one base in a worker")
    parser.add_argument("--shared", help="a folder that all machines see: jobs go on from their checkpoints")
    options = parser.parse_args()
    files = [Path(word) for word in options.words if word.endswith(".yaml")]
    words = [word for word in options.words if not word.endswith(".yaml")]
    configs = {file.stem: file.read_text(encoding="utf-8") for file in files}
    if len(configs) < len(files):
        raise SystemExit("two configurations have one name")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    ray.init(address=options.address, num_cpus=None if options.address else options.workers, include_dashboard=False)
    names = list(configs)
    groups = [names[at : at + options.together] for at in range(0, len(names), options.together)]
    here = os.getcwd()
    waiting = [train.remote({name: configs[name] for name in group}, words, here, options.shared) for group in groups]
    failed: list[str] = []
    while waiting:
        done, waiting = ray.wait(waiting)
        for name, tar in ray.get(done[0]).items():
            if tar is None:
                failed.append(name)
            else:
                print(collected(output, name, tar), flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} adapters" + (f", failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
