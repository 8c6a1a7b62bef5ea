"""Writes a trained generator to this folder, as a model that every command finds by its name.

    python models/pack.py RUN compact-x4 "what it is, in one line"

RUN is a run's or checkpoint's folder. The EMA weights are rounded to 16-bit floating-point numbers, which halves the
file; the commands compute with them in 32 bits.
"""

from pathlib import Path

import torch

from pipeline import command
from pipeline.errors import UserError
from pipeline.model import decode_generator
from pipeline.model.weights import encode_generator
from pipeline.training.model_source import GENERATOR_FILE, find_model_file


def main(argv: list[str]) -> None:
    """Reads the generator and writes NAME.safetensors next to this file."""
    if len(argv) != 3:
        raise UserError('usage: python models/pack.py RUN NAME "DESCRIPTION"')
    source, name, description = argv
    generator, _ = decode_generator(find_model_file(source, GENERATOR_FILE, source)[0], source)
    target = Path(__file__).with_name(f"{name}.safetensors")
    target.write_bytes(encode_generator(generator, {"description": description}, torch.float16))
    print(f"written: {target} ({target.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    command.run(main)
