"""Collects the photos that the compact model is trained on: openly licensed ones in Debian's wallpaper packages.

    python models/photos.py photos              writes photos/train/*.jpg and photos/held_out/*.jpg

On Debian 12 or newer. Downloads about 160 MB with `apt-get download`, which needs no root. photos.tsv next to
this file names each photo's package, license and author. Photos are reduced to 1100 pixels, because most are not sharp
at full size, and written as JPEG with quality 95 and 4:4:4.
"""

import csv
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

LONGEST_PX = 1100
TABLE = Path(__file__).with_name("photos.tsv")


def collect(out: Path) -> int:
    """Writes all photos below `out`; returns their number."""
    with TABLE.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    by_package = defaultdict(list)
    for row in rows:
        by_package[row["package"]].append(row)
    with TemporaryDirectory() as folder:
        for package, photos in by_package.items():
            subprocess.run(["apt-get", "download", "--quiet", package], cwd=folder, check=True)
            (archive,) = Path(folder).glob(f"{package}_*.deb")
            unpacked = Path(folder, package)
            subprocess.run(["dpkg-deb", "--extract", archive, unpacked], check=True)
            for row in photos:
                target = out / ("train" if row["use"] == "train" else "held_out")
                target.mkdir(parents=True, exist_ok=True)
                reduce(unpacked / row["file"], target / f"{name_of(row['file'])}.jpg")
    return len(rows)


def name_of(file: str) -> str:
    """`wallpapers/Path/contents/images/2560x1600.jpg` to `Path`; else the file's name without suffix."""
    path = Path(file)
    return path.parts[-4] if "contents" in path.parts else path.stem


def reduce(source: Path, target: Path) -> None:
    """Reduces an image to LONGEST_PX with an antialiasing filter and writes it as JPEG."""
    with Image.open(source) as image:
        photo = image.convert("RGB")
    photo.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS, reducing_gap=None)
    photo.save(target, quality=95, subsampling=0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python models/photos.py FOLDER")
    if shutil.which("apt-get") is None:
        sys.exit("error: apt-get was not found; the photos are in packages of Debian")
    print(f"{collect(Path(sys.argv[1]))} photos in {sys.argv[1]}")
