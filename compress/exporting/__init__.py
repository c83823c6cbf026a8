"""From a torch network to an ONNX file."""
