"""Everything that runs ONNX Runtime: sessions, feeds, statistics, drift, timing."""

from .capture import capture, capture_raw
from .drift import Drift, compare
from .entrant import Variant
from .feeds import Feed, Feeds, load_feeds, parse_shape
from .limits import Limit, parse_limit
from .moments import DiagonalMoments, Moments
from .scatter import Scatter
from .sessions import Session, Source, open_session
from .specs import InputSpec, ValueSpec, input_specs
from .synthetic import synthetic_feeds
from .timing import race

__all__ = ["DiagonalMoments", "Drift", "Feed", "Feeds", "InputSpec", "Limit", "Moments", "Scatter", "Session", "Source",
           "ValueSpec", "Variant", "capture", "capture_raw", "compare", "input_specs", "load_feeds", "open_session",
           "parse_limit", "parse_shape", "race", "synthetic_feeds"]
