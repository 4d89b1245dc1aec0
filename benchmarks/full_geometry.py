"""Make a checkpoint of switch-c-2048's full geometry, 3.14 TB as `ls` sees it, on a disk with a few GB free.

    python benchmarks/full_geometry.py /path/to/folder --container torch

Names, shapes, shards and the mistakes of config.json are the Hub's. Dense weights are real random bytes, experts are
holes in sparse files: they read as zeros and cost no disk time. So this shows that the geometry works, how long opening
and planning take and how much memory is needed; it says nothing about the speed of reading experts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from switchrun.bench.synthetic import GEOMETRIES, Container, Shapes, make_checkpoint
from switchrun.checkpoint.files import open_weights
from switchrun.checkpoint.torch_file import read_torch


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--container", choices=["torch", "safetensors"], default="torch")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="switch-c-2048")
    parser.add_argument("--experts", type=int, help="experts in each layer, if not the geometry's own")
    arguments = parser.parse_args()

    start = time.perf_counter()
    geometry = GEOMETRIES[arguments.geometry]
    if arguments.experts:
        geometry = replace(geometry, num_experts=arguments.experts)
    container = Container("pytorch_model", ".bin", write_torch) if arguments.container == "torch" else None
    tensors = make_checkpoint(arguments.folder, geometry, container=container)
    files = [file.stat() for file in arguments.folder.iterdir()]
    print(
        f"{len(files) - 2} shards, {tensors} tensors, {sum(f.st_size for f in files) / 1e12:.3f} TB as seen, "
        f"{sum(f.st_blocks * 512 for f in files) / 1e9:.2f} GB on disk, made in {time.perf_counter() - start:.0f} s"
    )


def write_torch(path: Path, shapes: Shapes) -> dict[str, int]:
    """Write what `torch.save` writes, with holes for the data; return the offset of every tensor."""
    with FakeTensorMode():
        fakes = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fakes, path)
    with open_weights(path) as file:
        return {name: entry.offset for name, entry in read_torch(file).items()}


if __name__ == "__main__":
    main()
