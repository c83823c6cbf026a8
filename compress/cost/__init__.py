"""What a network costs: MACs and weights, counted from torch and from ONNX."""
