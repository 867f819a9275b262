"""ffnfold: rewrite the feed-forward blocks of an exported ONNX transformer and prove what it cost and gained."""

__version__ = "0.1.0"
