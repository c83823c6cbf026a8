"""What a detection pipeline is told about torchvision's SSDlite: how boxes follow from its outputs, and its loss.

This is what a user's own file would hold for a detector of torchvision.
"""

from compress.checkpoint.rebuild import build_module
from compress.model.artifacts import FactorySpec
from compress.networks.detectors import Loss, Postprocess

NETWORK = FactorySpec("torchvision", "ssdlite320_mobilenet_v3_large", {"num_classes": 5})  # the ground and four shapes
IMAGE_SIZE = (128, 128)

_detector = build_module(NETWORK)
decode = Postprocess(_detector)
loss = Loss(_detector, IMAGE_SIZE)
