"""Everything that runs ONNX Runtime: sessions, feeds, statistics, drift, timing."""
