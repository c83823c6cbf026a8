"""Conversion of exported files into the formats of other runtimes."""

FOLDER = "formats"  # beside the ONNX file; here, so that who only names it need not import onnx
