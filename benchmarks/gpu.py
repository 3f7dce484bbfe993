"""The benches that a GPU has something to say about, in one file: `python -m benchmarks.gpu --out FILE`.

`make gpu-check` runs it. It names the device, the driver and the versions, and runs anywhere.
"""

import subprocess
from importlib.metadata import PackageNotFoundError, version

from benchmarks import amp, amp_peers, blocks, common, optimizers, recompute
from jaxtricks.lab.report import hardware

CUDA = (
    "jaxlib",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cublas-cu12",
)
QUERY = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total",
    "--format=csv,noheader",
)


def packages() -> str:
    """Versions of what makes the programs."""
    found = []
    for name in CUDA:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def driver() -> str:
    """Name, driver and memory of the GPU, as nvidia-smi says."""
    try:
        done = subprocess.run(
            QUERY, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "no NVIDIA driver"
    return done.stdout.strip().replace("\n", "; ")


def main() -> None:
    """Measure and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.gpu", rounds=optimizers.ROUNDS)
    heading = (
        f"On this device: `{command}`\n\n{hardware()}.\n{packages()}.\n{driver()}.\n\n"
        f"Medians over {args.rounds} rounds ({amp.ROUNDS} of ours / peer); what the columns say is at the\n"
        "head of the other files here: amp_peers (error, kept), optimizers, blocks."
    )
    tables = [amp.table(), amp.build_table(), recompute.table()]
    tables += [
        amp_peers.table(name, *task) for name, task in amp_peers.tasks().items()
    ]
    tables += optimizers.tables(args.rounds)
    tables += [
        blocks.bytes_table(),
        *(blocks.time_table(title, args.rounds) for title in blocks.TABLES),
    ]
    common.publish(tables, heading, args.out)


if __name__ == "__main__":
    main()
