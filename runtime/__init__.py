"""Everything that runs ONNX Runtime: sessions, feeds, statistics, drift, timing."""

from .capture import capture, capture_raw
from .feeds import Feed, Feeds, load_feeds, parse_shape
from .moments import DiagonalMoments, Moments
from .sessions import Session, Source, open_session
from .specs import InputSpec, ValueSpec, input_specs
from .synthetic import runnable_feeds, synthetic_feeds

__all__ = ["DiagonalMoments", "Feed", "Feeds", "InputSpec", "Moments", "Session", "Source", "ValueSpec", "capture",
           "capture_raw", "input_specs", "load_feeds", "open_session", "parse_shape", "runnable_feeds", "synthetic_feeds"]
