"""Networks, losses and weight files. Requires torch, torchvision and safetensors.

Two modules are not imported here: `pipeline.model.config` requires pydantic, `pipeline.model.export` requires onnx.
"""

from pipeline.model.device import set_deterministic, set_precision
from pipeline.model.discriminators import DISCRIMINATORS, UNetDiscriminator, VGGStyleDiscriminator
from pipeline.model.features import LAYERS, VGGFeatures
from pipeline.model.lite0 import LITE0_LAYERS, Lite0Features
from pipeline.model.losses import relativistic_losses
from pipeline.model.rrdbnet import RRDBNet
from pipeline.model.seeding import seeded
from pipeline.model.weights import decode_generator, generator_sha256, save_generator
