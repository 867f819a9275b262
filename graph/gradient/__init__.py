"""Derivatives of a graph, as more nodes of the same graph, which ONNX Runtime runs like any others."""
