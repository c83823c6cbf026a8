"""Export of torch networks to ONNX files."""
