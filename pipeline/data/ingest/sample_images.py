"""Sample images with a clear license from installed packages."""

from importlib import resources
from pathlib import Path

from PIL import Image

TRAIN = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")  # skimage/data
HELD_OUT = ("china.jpg", "flower.jpg")  # sklearn/datasets/images

ATTRIBUTION = """\
Images in train/ come with scikit-image:
  astronaut  Eileen Collins, by NASA (public domain)
  coffee     by Rachel Michetti (CC0)
  chelsea    Chelsea the cat, by Stefan van der Walt (CC0)
  rocket     Falcon 9 with DSCOVR, by SpaceX (CC0)
Images in held_out/ come with scikit-learn:
  china      by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/ (CC BY 2.0)
  flower     by vultilion, https://www.flickr.com/photos/vultilion/6056698931/ (CC BY 2.0)
All are stored as PNG; the pixels are unchanged.
"""


def write_sample_photos(folder: str | Path) -> None:
    """Writes four images to folder/train and two to folder/held_out as PNG, with ATTRIBUTION.txt next to them.

    Existing files are not modified.
    """
    target = Path(folder)
    for part, package, names in (
        ("train", "skimage.data", TRAIN),
        ("held_out", "sklearn.datasets.images", HELD_OUT),
    ):
        (target / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = target / part / f"{Path(name).stem}.png"
            if path.exists():
                continue
            partial = path.with_suffix(".partial")
            with resources.files(package).joinpath(name).open("rb") as file, Image.open(file) as image:
                image.convert("RGB").save(partial, format="PNG")
            partial.replace(path)
        (target / part / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
    (target / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
